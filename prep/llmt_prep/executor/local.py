"""Tasks in worker processes of this machine, or in this very process with one worker."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from llmt_prep.executor.worker import Task, named, outcome, use_one_thread
from llmt_shared.errors import Stopped

_GRACE = 5.0
"""Seconds that a worker has to remove what it was writing, before it is killed."""
_GO_ON = "nothing is lost: run the same command again to go on, with fewer --workers if the machine was out of memory"
_TERMINATED = 128 + signal.SIGTERM


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection
    """Tasks go out, (result, error) come back."""


class Local(NamedTuple):
    """An executor, as the room's contract says."""

    workers: int
    """Processes, of which no more start than there are tasks; 1 runs everything here."""

    @property
    def hosts(self) -> int:
        """This machine."""
        return 1

    def run(self, function: Callable[..., Any], tasks: Iterable[Task]) -> Iterator[tuple[int, Any]]:
        """Run tasks, as the room's contract says; a worker that dies stops the run."""
        waiting = iter(enumerate(tasks))
        first = list(islice(waiting, self.workers))
        if len(first) > 1:
            yield from _in_processes(function, first, waiting)
            return
        for index, task in chain(first, waiting):
            yield index, function(*task)

    def report(self) -> dict[str, object]:
        """What run.json says of it."""
        return {"executor": "local", "workers": self.workers}


def usable_cpus() -> int:
    """CPUs that this process may use; where the system does not tell, those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(
    function: Callable[..., Any], first: list[tuple[int, Task]], waiting: Iterator[tuple[int, Task]]
) -> Iterator[tuple[int, Any]]:
    """One task at a time to each worker: the next is sent before a result is handed on, so none waits for long."""
    with _started(function, len(first)) as crew:
        doing = dict(zip(crew, first, strict=True))
        for worker, (index, task) in doing.items():
            _send(worker, function, index, task)
        while doing:
            ready = wait([worker.connection for worker in doing])
            for worker in [worker for worker in doing if worker.connection in ready]:
                done, task = doing.pop(worker)
                result = _receive(worker, function, done, task)
                if (following := next(waiting, None)) is not None:
                    doing[worker] = following
                    _send(worker, function, *following)
                yield done, result


@contextmanager
def _started(function: Callable[..., Any], count: int) -> Iterator[list[_Worker]]:
    """Start workers; at the end of the block they have ended, and where it ends in an error, so have their tasks."""
    crew: list[_Worker] = []
    try:
        with _interrupts_waiting():
            for _ in range(count):
                crew.append(_start(function))
        yield crew
    except BaseException:
        for worker in crew:
            worker.process.terminate()
        raise
    finally:
        for worker in crew:
            worker.connection.close()
        _join(crew)


def _start(function: Callable[..., Any]) -> _Worker:
    # spawn: forking a process that runs threads (tokenizers, numba, progress bar) can dead-lock the child
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function), daemon=True)
    try:
        process.start()
    finally:
        theirs.close()  # the worker's is then the only one, and it closes when the worker dies
    return _Worker(process, ours)


def _join(crew: list[_Worker]) -> None:
    deadline = time.monotonic() + _GRACE
    for worker in crew:
        worker.process.join(max(0.0, deadline - time.monotonic()))
    for worker in crew:
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _send(worker: _Worker, function: Callable[..., Any], index: int, task: Task) -> None:
    try:
        worker.connection.send(task)
    except OSError:
        _fail_dead(worker, function, index, task)


def _receive(worker: _Worker, function: Callable[..., Any], index: int, task: Task) -> Any:
    try:
        result, error = worker.connection.recv()
    except (EOFError, OSError):
        _fail_dead(worker, function, index, task)
    if isinstance(error, MemoryError):
        raise Stopped(f"a worker process had no memory left; {_GO_ON}") from None
    if error is not None:
        raise error
    return result


def _fail_dead(worker: _Worker, function: Callable[..., Any], index: int, task: Task) -> NoReturn:
    worker.process.join(_GRACE)
    code = worker.process.exitcode or 0
    how = f"was killed by {_name(-code)}" if code < 0 else f"ended with exit code {code}"
    raise Stopped(f"a worker process {how} in {named(function, index, task)}; {_GO_ON}") from None


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have none
        return f"signal {number}"


@contextmanager
def _interrupts_waiting() -> Iterator[None]:
    """Hold Ctrl-C back while workers start: they inherit this, and else show a traceback before they can ignore it."""
    resource_tracker.ensure_running()  # the first worker would start it, and it lets interrupts through when it does
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    """Run tasks until there are no more; the main function of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, _end_task)
    use_one_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(outcome(function, task))


def _end_task(number: int, frame: FrameType | None) -> None:
    """End by an exception, so that files that are half-written are removed on the way out."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: the way out must not be cut short
    sys.exit(_TERMINATED)


def _end_with_parent() -> None:
    """Without this a worker outlives a parent that was killed, waiting for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)  # the main thread removes what it was writing
        time.sleep(_GRACE)
        os._exit(1)
