"""Tasks with the clock running: what they return, and what is start-up."""

import os

import pytest

from llmt_prep.simulation import clocks
from llmt_prep.simulation.clocks import clocked, peak_bytes, peak_of_block


def answer(number: int) -> tuple[int, int]:
    """Any task; its process tells where it ran."""
    return 10 * number, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_answered_in_its_order_and_the_warm_up_is_not_counted(workers: int) -> None:
    tasks = [(number,) for number in range(6)]
    found = clocked("answer", answer, tasks, tasks[:workers])
    assert [call.result[0] for call in found.calls] == [0, 10, 20, 30, 40, 50]
    assert [call.task for call in found.calls] == list(range(6))
    assert {call.result[1] for call in found.calls} == {call.process for call in found.calls}
    assert (os.getpid() in {call.process for call in found.calls}) == (workers == 1)
    assert found.workers == workers


def test_what_only_the_first_call_does_is_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by what a task says it takes: half a second at first, then a hundredth."""
    now = [100.0]
    takes = iter([0.5, 0.01, 0.01, 0.01])
    monkeypatch.setattr(clocks.time, "monotonic", lambda: now[0])

    def work() -> None:
        now[0] += next(takes)

    found = clocked("slow", work, [()] * 3, [()])
    assert found.warming == pytest.approx(0.49)
    assert found.seconds == pytest.approx(0.03)
    assert found.spawning == pytest.approx(0)


def test_the_peak_of_a_block_holds_what_was_allocated_in_it() -> None:
    with peak_of_block() as peak:
        bytearray(100_000_000)
    assert peak[0] >= 100_000_000
    assert peak_bytes() >= peak[0]
