"""Who is to blame for a run that failed."""

import signal

import pytest

from llmt_shared.errors import ConfigError, LlmtError, Stopped
from llmt_train.parallel.board import Beat, Ending
from llmt_train.parallel.failures import Fate, RankError, ending_of, late, verdict

WAITING = Ending("waiting", 1, "RuntimeError: Connection closed by peer")
STUCK = Beat(9, 17, "data/stream.py:120 read", 31.0)


def fates(*endings: Ending | None, signals: dict[int, int] | None = None, beat: Beat | None = STUCK) -> list[Fate]:
    return [Fate(rank, f"node{rank}", beat, ending, (signals or {}).get(rank)) for rank, ending in enumerate(endings)]


def test_a_killed_rank_is_named_and_not_those_that_waited():
    found = verdict(fates(WAITING, None, WAITING, signals={1: signal.SIGKILL}), 60)
    assert "rank 1 (node1) was killed by SIGKILL after step 17" in str(found)
    assert "rank 0" not in str(found)
    assert "rank 2" not in str(found)


def test_a_rank_without_a_sign_of_life_is_named():
    assert "rank 2 (node2) gives no sign of life after step 17" in str(
        verdict(fates(WAITING, WAITING, None, signals={2: 0}), 60)
    )


def test_a_rank_that_hangs_is_named_with_its_place():
    found = str(verdict(fates(None, WAITING), 60))
    assert "rank 0 (node0) is behind after step 17" in found
    assert "parallel.timeout: 60 s" in found
    assert "data/stream.py:120 read for 31 s" in found


def test_a_rank_that_nccl_ended_waited_for_the_one_that_lives():
    found = str(verdict(fates(None, None, signals={0: signal.SIGABRT}), 60))
    assert "rank 1 (node1) is behind" in found
    assert "rank 0" not in found


def test_a_rank_that_aborted_alone_is_to_blame():
    assert "rank 1 (node1) was killed by SIGABRT" in str(verdict(fates(WAITING, None, signals={1: 6}), 60))


def test_an_error_is_shown_with_its_rank():
    found = verdict(fates(WAITING, Ending("failed", 1, "ValueError: odd"), WAITING), 60)
    assert str(found) == "rank 1 (node1): ValueError: odd"
    assert isinstance(found, RankError)


def test_the_same_error_of_all_is_shown_once():
    assert str(verdict(fates(*[Ending("failed", 1, "ValueError: odd")] * 3), 60)) == "all ranks: ValueError: odd"


def test_a_mistake_of_all_is_told_as_that_of_one_process():
    found = verdict(fates(*[Ending("told", 2, "model: no such folder")] * 3), 60)
    assert (type(found), str(found)) == (ConfigError, "model: no such folder")


def test_a_mistake_of_one_is_told_with_its_rank():
    found = verdict(fates(WAITING, Ending("told", 2, "data: no such folder")), 60)
    assert (type(found), str(found)) == (ConfigError, "rank 1 (node1): data: no such folder")


def test_a_run_that_all_stopped_is_stopped():
    assert isinstance(verdict(fates(*[Ending("told", 4, "saved at step 3")] * 2), 60), Stopped)


def test_ranks_that_all_waited_are_all_shown():
    found = str(verdict(fates(WAITING, WAITING), 60))
    assert "all ranks waited for each other" in found
    assert "rank 0 (node0) waited" in found
    assert "rank 1 (node1) waited" in found


def test_of_many_ranks_some_are_named():
    found = str(verdict(fates(WAITING, *[None] * 20, signals=dict.fromkeys(range(1, 21), 9)), 60))
    assert found.count("was killed by SIGKILL") == 8
    assert "and 12 more" in found


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (None, "done", 0),
        (ConfigError("x"), "told", 2),
        (Stopped("x"), "told", 4),
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), "waiting", 1),
        (RuntimeError("shapes differ"), "failed", 1),
        (ValueError("the gloo paint"), "failed", 1),
    ],
)
def test_how_an_error_is_told_to_the_others(error: BaseException | None, kind: str, code: int):
    assert ending_of(error)[:2] == (kind, code)


def test_an_error_that_a_lost_peer_caused_is_waiting():
    error = ValueError("not saved")
    error.__cause__ = RuntimeError("gloo: timed out")
    assert ending_of(error).kind == "waiting"


def test_an_error_keeps_its_last_lines():
    try:
        raise ArithmeticError("odd")
    except ArithmeticError as error:
        text = ending_of(error).text
    assert text.startswith("ArithmeticError: odd")
    assert "in test_an_error_keeps_its_last_lines" in text


HOSTS = {0: "a", 1: "a", 2: "b"}


def test_late_is_who_has_done_fewer_steps():
    beats = {rank: Beat(1, step, "x", 1.0) for rank, step in enumerate((5, 4, 5))}
    assert late(beats, HOSTS) == "rank 1 (a) is at x"


def test_late_is_who_is_elsewhere_in_the_same_step():
    beats = {rank: Beat(1, 5, place, 1.0) for rank, place in enumerate(("wait", "wait", "read"))}
    assert late(beats, HOSTS) == "rank 2 (b) is at read"


def test_late_is_who_gives_no_sign():
    assert "no sign of life of rank 2 (b)" in str(late({0: STUCK, 1: STUCK}, HOSTS))


def test_nobody_is_late_where_all_are_at_one_place():
    assert late(dict.fromkeys(range(3), STUCK), HOSTS) is None


def test_the_verdict_is_for_the_user():
    assert isinstance(verdict(fates(WAITING), 60), LlmtError)
