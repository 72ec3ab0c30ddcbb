"""Where tasks run. A task is a function and picklable arguments; it writes files and returns little.

`local` runs them in processes of this machine, or in this very process with one worker. Results come back as tasks
end; nothing depends on that order.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from llmt_shared.errors import DataError

Task = tuple[Any, ...]


def run(function: Callable[..., Any], tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, Any]]:
    """Run ``function(*task)`` for every task; yields (index of the task, result).

    Args:
        function: importable by name; what its calls share it caches itself, once in each process.
        tasks: arguments of each call.
        workers: processes; 1 runs everything here.

    Raises:
        DataError: a worker died.
    """
    if workers == 1 or len(tasks) <= 1:
        for index, task in enumerate(tasks):
            yield index, function(*task)
        return
    yield from _in_processes(function, tasks, min(workers, len(tasks)))


def usable_cpus() -> int:
    """CPUs that this process may use; where the system does not tell, those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(function: Callable[..., Any], tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, Any]]:
    # spawn: forking a process that runs threads (tokenizers, numba, progress bar) can dead-lock the child
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        with _interrupts_waiting():
            index_of: dict[Future[Any], int] = {pool.submit(function, *task): i for i, task in enumerate(tasks)}
        for future in as_completed(index_of):
            yield index_of.pop(future), future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, perhaps killed for want of memory; nothing is lost: run the same command again, "
            "with fewer --workers if it was memory"
        ) from None
    except BaseException:
        for process in (pool._processes or {}).values():
            process.terminate()  # tasks write whole files or none, so nothing is half-done
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_waiting() -> Iterator[None]:
    """Hold Ctrl-C back while workers start: they inherit this, and else show a traceback before they can ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one of as many as there are CPUs
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this a worker outlives a parent that was killed, waiting for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
