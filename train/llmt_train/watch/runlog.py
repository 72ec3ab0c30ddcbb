"""run.log: what a person saw of a run, over all its starts, with times and without a terminal's control codes."""

import socket
import sys
import traceback
import warnings
from contextlib import ExitStack, suppress
from datetime import datetime
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Any

from llmt_shared.errors import LlmtError, Stopped
from llmt_shared.progress import is_silent, kept_by
from llmt_train.watch.environment import versions

NAME = "run.log"


class RunLog:
    """Keeps what is said while it is entered, Python's warnings, and the error that ends it.

    Nothing is written before `open`, so that a run that is refused, or finished already, leaves no trace.
    """

    def __init__(self) -> None:
        self._file: RawIOBase | None = None
        self._waiting: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> "RunLog":
        """Begin to keep."""
        self._stack.enter_context(kept_by(self.keep))
        shown = warnings.showwarning

        def show_and_keep(message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
            self.keep(f"warning: {category.__name__}: {message}")
            shown(message, category, *place, **options)

        warnings.showwarning = show_and_keep
        self._stack.callback(setattr, warnings, "showwarning", shown)
        return self

    def open(self, directory: Path) -> None:
        """Write what was kept so far, and from now on at once, below a line that says what starts here.

        A process for which another one speaks writes nothing.
        """
        if is_silent():
            return
        self._file = (directory / NAME).open("ab", buffering=0)  # each line at once, and none that closing still writes
        self._stack.callback(self._file.close)
        packages = ", ".join(f"{name} {version}" for name, version in versions().items())
        python = ".".join(map(str, sys.version_info[:3]))
        waiting, self._waiting = self._waiting, []
        self.keep(f"start on {socket.gethostname()}: python {python}, {packages}")
        for line in waiting:
            self._write(line)

    def keep(self, message: str) -> None:
        """Keep a message with its time; one that cannot be written ends no run."""
        line = _line(message)
        if self._file is None:
            self._waiting.append(line)
        else:
            self._write(line)

    def _write(self, line: str) -> None:
        assert self._file is not None
        with suppress(OSError):
            self._file.write(line.encode(errors="backslashreplace"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep how it ended."""
        if isinstance(error, LlmtError):
            self.keep(f"{'stopped' if isinstance(error, Stopped) else 'error'}: {error}")
        elif error is not None:
            self.keep("error: " + "".join(traceback.format_exception(error)).rstrip())
        self._stack.close()


def add_line(directory: Path, message: str) -> None:
    """Add a line to the log of a run that has ended, if it began one."""
    with suppress(OSError), (directory / NAME).open("rb+") as file:
        file.seek(0, 2)
        file.write(_line(message).encode(errors="backslashreplace"))


def _line(message: str) -> str:
    return f"{datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')}  {message}\n"
