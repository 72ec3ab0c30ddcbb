"""Where tasks run: in processes of this machine (`local`), on a Ray cluster (`cluster`), or in this process (`HERE`).

The contract of `run`, which every executor keeps and every caller relies on:

- a function is importable by name; a task is a tuple of its arguments, small and picklable, that says which work to
  do, like (plan, index), and holds none of the data;
- a call reads and writes files that every worker reaches, relative paths from where this process was at its start;
  they appear whole or not at all, and the same task again makes the same files, so a task may run twice, anywhere, in
  any order, even after the run that gave it has ended;
- it returns little: what is big goes into the files;
- what calls share (a tokenizer, an open plan) the function caches itself, once in each process.

Results come as tasks end and nothing may depend on that order. Tasks are taken from their iterable when a worker is
free, so that memory does not grow with their number.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from llmt_prep.executor.local import Local, usable_cpus
from llmt_prep.executor.worker import Task
from llmt_shared.errors import ConfigError

Kind = Literal["local", "ray"]


class Executor(Protocol):
    """One way to run tasks."""

    @property
    def workers(self) -> int:
        """Tasks that run at a time."""

    @property
    def hosts(self) -> int:
        """Machines on which they run."""

    def run(self, function: Callable[..., Any], tasks: Iterable[Task]) -> Iterator[tuple[int, Any]]:
        """Run ``function(*task)`` for every task; yields (index of the task, result). See the contract above.

        Raises:
            Stopped: workers were lost, and doing their tasks again does not help.
            Exception: what a task raised; the tasks that still run are ended first.
        """

    def report(self) -> dict[str, object]:
        """What run.json says of it."""


def local(workers: int | None = None) -> Executor:
    """Run in so many processes; by default one for each CPU that this process may use."""
    return Local(workers or usable_cpus())


HERE: Executor = local(1)
"""Runs everything in this process: for work that is done sooner than others could be started."""


@contextmanager
def opened(
    kind: Kind,
    workers: int | None,
    *,
    address: str | None = None,
    memory: int = 0,
    marks: Sequence[Path] = (),
    inputs: Sequence[Path] = (),
) -> Iterator[Executor]:
    """Give an executor; what it started or joined is left when the block ends.

    Args:
        kind: which.
        workers: tasks that run at a time; ``None`` for as many as there is room for.
        address: of a Ray cluster; ``None`` for $RAY_ADDRESS, else a running one of this machine, else a new one.
        memory: bytes that Ray sets aside for each task.
        marks: files that this machine has written; what workers elsewhere read in them must be the same.
        inputs: files and folders that must be there for workers elsewhere, too.

    Raises:
        ConfigError: Ray is not installed; later, from `run`: the cluster cannot be reached or cannot do the work.
    """
    if kind == "local":
        yield local(workers)
        return
    try:
        from llmt_prep.executor.cluster import Cluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("executor: ray is not installed; run: pip install 'llmt[ray]'") from None
    cluster = Cluster(address, memory, workers, tuple(marks), tuple(inputs))
    try:
        yield cluster
    except BaseException as error:
        cluster.leave(error)
        raise
    cluster.leave(None)
