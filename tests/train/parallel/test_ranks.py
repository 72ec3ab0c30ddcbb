"""What tests learn of ranks that end without an answer."""

import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from train.parallel.ranks import on_ranks


def die_at_first(seen: Path) -> int:
    if dist.get_rank() == 1 and not seen.exists():
        seen.touch()
        os.abort()
    dist.barrier()
    return dist.get_rank()


def die_beside_a_failure(folder: Path) -> None:
    looked, died = folder / "looked", folder / "died"
    if dist.get_rank() == 0:
        is_right = died.exists()
        looked.touch()
        assert is_right, "what is wrong at times"
    elif not died.exists():
        while not looked.exists():
            time.sleep(0.01)
        died.touch()
        os.abort()


def test_a_rank_that_a_signal_ended_is_shown_and_all_are_started_once_more(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"a signal ended a rank\nrank 1 ended with -6 .*\n(.*\n)*.* in die_at_first"):
        assert on_ranks(2, die_at_first, tmp_path / "seen") == [0, 1]


def test_what_ends_a_rank_each_time_is_a_failure() -> None:
    with (
        pytest.warns(UserWarning, match="a signal ended a rank"),
        pytest.raises(AssertionError, match="rank 0 ended with -6 and no answer:\nFatal Python error: Aborted"),
    ):
        on_ranks(1, os.abort)


def test_a_failure_beside_it_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"what is wrong at times(.*\n)*rank 1 ended with -6 and no answer"):
        on_ranks(2, die_beside_a_failure, tmp_path)


def test_another_end_is_not_tried_again() -> None:
    with pytest.raises(AssertionError, match="rank 0 ended with 3 and no answer"):
        on_ranks(1, os._exit, 3)
