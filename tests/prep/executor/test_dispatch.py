"""Handing tasks to workers that may be lost: once each where all goes well, again where one is, and not for ever."""

import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import small_tasks

from llmt_prep.executor import dispatch as dispatching
from llmt_prep.executor.dispatch import TRIES, Ended, Lost, dispatch
from llmt_prep.executor.worker import outcome
from llmt_shared.errors import DataError, Stopped


class FakeCrew:
    """Ends tasks at once, in order; `lost` says how often an index loses its worker, `stuck` which never end."""

    def __init__(self, size: int = 3, lost: dict[int, int] | None = None, stuck: frozenset[int] = frozenset()) -> None:
        self.size, self.lost, self.stuck = size, Counter(lost or {}), stuck
        self.under_way = self.most = self.looks = 0
        self.begun: list[tuple[int, int]] = []
        self.cancelled: list[tuple[int, bool]] = []
        self.ends: dict[int, Callable[..., None]] = {}

    def room(self) -> int:
        return self.size

    def begin(self, function: Any, task: tuple[Any, ...], tries: int, end: Callable[[Lost | Ended], None]) -> int:
        number = task[0]
        self.begun.append((number, tries))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        if number in self.stuck:
            self.ends[number] = end
            return number
        if self.lost[number] >= tries:
            self._end(end, Lost("a worker process was lost"))
        else:
            self._end(end, Ended(*outcome(function, task)))
        return number

    def _end(self, end: Callable[[Lost | Ended], None], how: Lost | Ended) -> None:
        def run() -> None:
            self.under_way -= 1
            end(how)

        threading.Timer(0.001, run).start()

    def cancel(self, begun: int, force: bool) -> None:
        self.cancelled.append((begun, force))
        if begun in self.ends and (begun % 2 == 0 or force):  # odd ones need force
            self.ends[begun](Lost("cancelled"))

    def look(self) -> None:
        self.looks += 1


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatching, "_PULSE", 0.01)
    monkeypatch.setattr(dispatching, "_GRACE", 0.1)
    monkeypatch.setattr(dispatching, "_PAUSE", 0.01)


def numbered(count: int) -> Iterator[tuple[int]]:
    return ((number,) for number in range(count))


@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_every_task_gives_its_result_once(count: int) -> None:
    crew = FakeCrew()
    assert sorted(dispatch(crew, small_tasks.square, numbered(count))) == [(n, n * n) for n in range(count)]
    assert crew.most <= crew.size


def test_tasks_are_taken_only_as_there_is_room() -> None:
    crew = FakeCrew(size=4)
    for seen, _ in enumerate(dispatch(crew, small_tasks.square, numbered(200)), 1):
        assert len(crew.begun) <= seen + crew.size
    assert crew.looks >= 200


@pytest.mark.parametrize("times", range(1, TRIES))
def test_a_lost_task_is_done_again(times: int) -> None:
    crew = FakeCrew(lost={2: times})
    assert sorted(dispatch(crew, small_tasks.square, numbered(5))) == [(n, n * n) for n in range(5)]
    assert [tries for number, tries in crew.begun if number == 2] == list(range(1, times + 2))


def test_a_task_that_loses_all_its_workers_stops_the_run_and_is_named() -> None:
    with pytest.raises(Stopped, match=rf"^a worker process was lost in each of {TRIES} tries at task 2, square\(2,\)"):
        list(dispatch(FakeCrew(lost={2: TRIES}), small_tasks.square, numbered(5)))


def test_a_lost_machine_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    crew = FakeCrew(size=20, lost=dict.fromkeys(range(20), 1))
    assert len(list(dispatch(crew, small_tasks.square, numbered(40)))) == 40
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"a worker process was lost; task \d+ is done again, try 2 of 4", lines[0])


def test_what_a_task_raises_ends_the_others_gently_and_then_by_force() -> None:
    def fail(number: int) -> None:
        raise DataError(f"bad record {number}")

    crew = FakeCrew(size=4, stuck=frozenset({0, 1, 3}))
    with pytest.raises(DataError, match="bad record 2"):
        list(dispatch(crew, fail, numbered(9)))
    assert crew.cancelled[:3] == [(0, False), (1, False), (3, False)]
    assert set(crew.cancelled[3:]) <= {(1, True), (3, True), (4, False), (4, True)}


def test_a_signal_is_acted_on_while_nothing_ends() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    crew = FakeCrew(size=2, stuck=frozenset({0, 2}))
    threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(dispatch(crew, small_tasks.square, ((number,) for number in (0, 2))))
    finally:
        signal.signal(signal.SIGINT, before)
    assert crew.cancelled == [(0, False), (2, False)]


def test_a_crew_that_is_gone_stops_the_run_though_results_still_come() -> None:
    class Gone(FakeCrew):
        def look(self) -> None:
            super().look()
            if self.looks == 5:
                raise Stopped("gone")

    with pytest.raises(Stopped, match="gone"):
        list(dispatch(Gone(), small_tasks.square, numbered(200)))


def test_a_run_that_is_not_read_to_its_end_ends_its_tasks() -> None:
    crew = FakeCrew(size=2, stuck=frozenset({4}))
    results = dispatch(crew, small_tasks.square, numbered(100))
    for _ in range(20):
        next(results)
    results.close()
    assert crew.cancelled[0] == (4, False)
