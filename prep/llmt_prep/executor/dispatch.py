"""How tasks are handed to workers that may be lost: as many at a time as there is room for, and again where one is.

Nothing here knows what runs them: a `Crew` does. What is kept are the tasks under way and no others.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

from llmt_prep.executor.worker import Task, named
from llmt_shared.errors import Stopped
from llmt_shared.progress import say

TRIES = 4
"""How often a task is begun before its workers' deaths are laid to it."""
_PULSE = 1.0
"""Seconds after which the crew is looked at, where no task has ended."""
_GRACE = 5.0
"""Seconds that tasks have to remove what they were writing, before their workers are killed."""
_PAUSE = 0.5
"""Seconds before the second try; twice as long before each further one."""
_SECONDS_BETWEEN_LINES = 5.0


class Lost(NamedTuple):
    """How a task ended whose worker or machine went away."""

    how: str


class Ended(NamedTuple):
    """How a task ended that came to an end of its own."""

    result: Any
    error: Exception | None


class Crew(Protocol):
    """What runs tasks."""

    def room(self) -> int:
        """Tasks to have under way now, those that wait for a worker included."""

    def begin(self, function: Callable[..., Any], task: Task, tries: int, end: Callable[[Lost | Ended], None]) -> Any:
        """Begin a task for the ``tries``-th time, and return what `cancel` knows it by.

        ``end`` is called once, from any thread.
        """

    def cancel(self, begun: Any, force: bool) -> None:
        """End a task, by an exception in it or by force."""

    def look(self) -> None:
        """Raise Stopped where nothing will end any more; called every second, or as often as tasks end."""


class _Begun(NamedTuple):
    task: Task
    tries: int
    handle: Any


def dispatch(crew: Crew, function: Callable[..., Any], tasks: Iterable[Task]) -> Iterator[tuple[int, Any]]:
    """Run ``function(*task)`` for every task; yields (index of the task, result).

    Raises:
        Stopped: a task lost its workers `TRIES` times, or the crew says that nothing will end any more.
        Exception: what a task raised; the tasks that still run are ended first.
    """
    flight = _Flight(crew, function, tasks)
    try:
        flight.fill()
        while flight.is_going():
            ended = flight.next_end()
            crew.look()
            flight.fill()  # the next is on its way before a result is handed on
            if ended is not None:
                yield ended
    finally:
        flight.end_all()


class _Flight:
    """The tasks under way, and those that begin again."""

    def __init__(self, crew: Crew, function: Callable[..., Any], tasks: Iterable[Task]) -> None:
        self._crew, self._function = crew, function
        self._waiting = iter(enumerate(tasks))
        self._is_drained = False
        self._begun: dict[int, _Begun] = {}
        self._again: list[tuple[float, int, Task, int]] = []
        """When to begin again, index, task, tries; the next first."""
        self._ends: SimpleQueue[tuple[int, Lost | Ended]] = SimpleQueue()
        self._log = _Log()

    def is_going(self) -> bool:
        """Whether a task is not done."""
        return bool(self._begun or self._again or not self._is_drained)

    def fill(self) -> None:
        """Begin as many tasks as there is room for."""
        while len(self._begun) < self._crew.room() and (following := self._next_task()) is not None:
            index, task, tries = following
            handle = self._crew.begin(self._function, task, tries, partial(self._end, index))
            self._begun[index] = _Begun(task, tries, handle)

    def next_end(self) -> tuple[int, Any] | None:
        """Wait for a task to end well; nothing where none does for a while, or one is lost."""
        try:
            index, end = self._ends.get(timeout=_PULSE)
        except Empty:
            return None
        begun = self._begun.pop(index)
        if isinstance(end, Lost):
            self._begin_again(index, begun, end.how)
            return None
        if end.error is not None:
            raise end.error
        return index, end.result

    def end_all(self) -> None:
        """End the tasks under way: gently, then by force."""
        for begun in self._begun.values():
            self._crew.cancel(begun.handle, force=False)
        deadline = time.monotonic() + _GRACE
        with suppress(Empty):
            while self._begun and (left := deadline - time.monotonic()) > 0:
                index, _ = self._ends.get(timeout=left)
                self._begun.pop(index, None)
        for begun in self._begun.values():
            self._crew.cancel(begun.handle, force=True)

    def _end(self, index: int, end: Lost | Ended) -> None:
        self._ends.put((index, end))

    def _next_task(self) -> tuple[int, Task, int] | None:
        if self._again and self._again[0][0] <= time.monotonic():
            _, index, task, tries = heapq.heappop(self._again)
            return index, task, tries
        following = next(self._waiting, None)
        self._is_drained = following is None
        return None if following is None else (*following, 1)

    def _begin_again(self, index: int, begun: _Begun, how: str) -> None:
        if begun.tries == TRIES:
            what = named(self._function, index, begun.task)
            raise Stopped(
                f"{how} in each of {TRIES} tries at {what}; nothing is lost: run the same command again to go on, with "
                f"more `ray.memory` for each task if machines were out of memory"
            )
        due = time.monotonic() + _PAUSE * 2 ** (begun.tries - 1)  # a machine that was out of memory needs a moment
        heapq.heappush(self._again, (due, index, begun.task, begun.tries + 1))
        self._log.add(f"{how}; task {index} is done again, try {begun.tries + 1} of {TRIES}")


class _Log:
    """Says what was lost: of a machine's death one line, not one for each of its tasks."""

    def __init__(self) -> None:
        self._said, self._unsaid = float("-inf"), 0

    def add(self, message: str) -> None:
        now = time.monotonic()
        if now - self._said < _SECONDS_BETWEEN_LINES:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} more since the last such line)" if self._unsaid else ""
        say(message + more)
        self._said, self._unsaid = now, 0
