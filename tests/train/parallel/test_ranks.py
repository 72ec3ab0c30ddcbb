"""What tests learn of ranks that end without an answer."""

import os
from pathlib import Path

import pytest
import torch.distributed as dist
from small_tasks import meet
from train.parallel.ranks import on_ranks


def die_at_first(seen: Path) -> int:
    dist.barrier()
    if dist.get_rank() == 1 and not seen.exists():
        seen.touch()
        os.abort()
    dist.barrier()
    return dist.get_rank()


def die_beside_another_end(folder: Path, code: int | None) -> None:
    rank = dist.get_rank()
    if (folder / str(rank)).exists():  # tried again
        return
    meet(folder, rank, 2)  # none ends while the other still connects
    if rank == 1:
        os.abort()
    if code is not None:
        os._exit(code)
    raise AssertionError("what is wrong at times")


def test_a_rank_that_a_signal_ended_is_shown_and_all_are_started_once_more(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"a signal ended a rank\nrank 1 ended with -6 .*\n(.*\n)*.* in die_at_first"):
        assert on_ranks(2, die_at_first, tmp_path / "seen") == [0, 1]


def test_what_ends_a_rank_each_time_is_a_failure() -> None:
    with (
        pytest.warns(UserWarning, match="a signal ended a rank"),
        pytest.raises(AssertionError, match="rank 0 ended with -6 and no answer:\nFatal Python error: Aborted"),
    ):
        on_ranks(1, os.abort)


@pytest.mark.parametrize(
    ("code", "told"),
    [(None, "what is wrong at times"), (3, "rank 0 ended with 3 and no answer")],
    ids=["raised", "left"],
)
def test_what_went_wrong_beside_it_is_not_tried_again(tmp_path: Path, code: int | None, told: str) -> None:
    with pytest.raises(AssertionError, match=rf"{told}(.*\n)*rank 1 ended with -6 and no answer"):
        on_ranks(2, die_beside_another_end, tmp_path, code)


def test_another_end_is_not_tried_again() -> None:
    with pytest.raises(AssertionError, match="rank 0 ended with 3 and no answer"):
        on_ranks(1, os._exit, 3)
