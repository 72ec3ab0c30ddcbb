"""A run's checkpoints, one after the other: before the training goes on, or in a thread while it does."""

import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType

from llmt_train.checkpoints.folders import State, prune
from llmt_train.checkpoints.training import Snapshot, WritingTraining
from llmt_train.checkpoints.writing import Documents, begun, complete
from llmt_train.config.run import SaveConfig
from llmt_train.parallel.together import Channel, by_first, new_channel


class Saver:
    """Writes the checkpoints of a run and removes older ones; all ranks have one and call it at the same steps.

    Asynchronously, `save` returns as soon as the state is copied to the host's memory. The checkpoint is whole when the
    next one is begun, or the saver is left, at the latest; an error of writing it is raised there.
    """

    def __init__(self, run_dir: Path, config: SaveConfig) -> None:
        """Begin; all ranks together."""
        self._run_dir = run_dir
        self._config = config
        # The thread speaks to those of other ranks while the training does.
        self._channel: Channel | None = new_channel() if config.asynchronous else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Saver":
        """Nothing more to begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written; its error does not hide one that is there already."""
        if error is None:
            self.wait()
        else:
            self._join()

    def save(self, state: State, documents: Documents, snapshot: Snapshot) -> None:
        """Write a checkpoint; see `save_checkpoint`. Waits for the one before it.

        Raises:
            OSError: it cannot be written, or the one before it could not; raised on all ranks.
        """
        self.wait()
        with ExitStack() as stack:
            temporary = stack.enter_context(begun(self._run_dir, state.step))
            writing = WritingTraining(temporary, snapshot)
            if self._channel is not None:
                writing.hold()
            rest = stack.pop_all()
        finish = partial(self._finish, rest, temporary, state, documents, writing)
        if self._channel is None:
            finish()
        else:
            self._thread = threading.Thread(target=self._keep_error, args=(finish,), name="checkpoint", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written; raise the error of what was."""
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _finish(
        self, rest: ExitStack, temporary: Path, state: State, documents: Documents, writing: WritingTraining
    ) -> None:
        with self._channel or nullcontext(), rest:
            complete(temporary, state, documents, writing.finish())
            by_first(lambda: prune(self._run_dir, self._config.keep, self._config.keep_best))

    def _keep_error(self, finish: Callable[[], None]) -> None:
        try:
            finish()
        except BaseException as error:
            self._error = error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
