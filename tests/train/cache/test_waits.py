"""Training that waits much for a store says so, once a minute and with numbers; what passes is not told."""

import pytest

from llmt_shared.objects import ObjectPath
from llmt_train.cache import waits as module
from llmt_train.cache.waits import Waits


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def run(clock: list[float], work: float, wait: float, seconds: float) -> None:
    waits = Waits(ObjectPath("s3://bucket/data"))
    while clock[0] < seconds:
        clock[0] += work
        with waits.waiting(), waits.fetching(10_000_000):
            clock[0] += wait


def test_a_slow_store_is_named_with_what_it_gives_and_what_is_lost(clock, capsys):
    run(clock, work=1, wait=4, seconds=130)
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "s3://bucket/data: the store is slower than training, which waited 48 s of the last 60 s; 2.0 MB/s"
    )
    assert len(others) == 1


def test_short_waits_are_not_told(clock, capsys):
    run(clock, work=10, wait=0.5, seconds=300)
    assert capsys.readouterr().err == ""


def test_filling_the_cache_at_the_start_is_no_fault_of_the_store(clock, capsys):
    waits = Waits(ObjectPath("s3://bucket/data"))
    with waits.waiting():
        clock[0] += 1000
    assert capsys.readouterr().err == ""
