"""Where tasks run: in worker processes of this machine (`local`), or in this very process (`HERE`).

The contract of `run`, which every executor keeps and every caller relies on:

- a function is importable by name; a task is a tuple of its arguments, small and picklable, that says which work to
  do, like (plan, index), and holds none of the data;
- a call reads and writes files that every worker reaches; they appear whole or not at all, and the same task again
  makes the same files, so a task may run twice, anywhere, in any order;
- it returns little: what is big goes into the files;
- what calls share (a tokenizer, an open plan) the function caches itself, once in each process.

Results come as tasks end and nothing may depend on that order. Tasks are taken from their iterable when a worker is
free, so that memory does not grow with their number.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from llmt_prep.executor.local import Task, run_local, usable_cpus


class Executor(NamedTuple):
    """One way to run tasks."""

    workers: int
    """Tasks that run at a time."""
    run: Callable[[Callable[..., Any], Iterable[Task]], Iterator[tuple[int, Any]]]
    """``run(function, tasks)`` yields (index of the task, result); it raises `Stopped` where a worker is lost for good,
    and what a task raised, after the tasks that still run were ended."""


def local(workers: int | None = None) -> Executor:
    """Run in so many processes; by default one for each CPU that this process may use."""
    count = workers or usable_cpus()
    return Executor(count, lambda function, tasks: run_local(function, tasks, count))


HERE = local(1)
"""Runs everything in this process: for work that is done sooner than others could be started."""
