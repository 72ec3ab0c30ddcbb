"""An error of one rank is an error of all."""

import errno

import pytest
from train.parallel.ranks import on_ranks

from llmt_shared.errors import FormatError
from llmt_train.parallel.together import agreed, by_first, divided, exchanged, own_rank, together, told_first


def exchange() -> list:
    rank = own_rank()
    return [exchanged(rank), told_first(10 + rank), by_first(lambda: rank), together(lambda: 2 * rank),
            agreed(lambda: -rank), divided(rank, lambda ranks: [f"{ranks} {rank}" for rank in ranks])]  # fmt: skip


def test_every_rank_gets_what_is_its_own() -> None:
    first, second = on_ranks(2, exchange)
    assert first == [[0, 1], [10, 11], 0, [0, 2], 0, "[0, 1] 0"]
    assert second == [[0, 1], None, 0, [0, 2], -1, "[0, 1] 1"]


def test_without_a_process_group_a_process_is_alone() -> None:
    assert exchange() == [[0], [10], 0, [0], 0, "[0] 0"]
    with pytest.raises(ZeroDivisionError):
        agreed(lambda: 1 / 0)


def fail(error: Exception, bad_rank: int) -> Exception:
    def raise_here() -> None:
        if own_rank() == bad_rank:
            raise error

    try:
        agreed(raise_here)
    except Exception as caught:
        return caught
    raise AssertionError("no error")


def failures() -> list[str]:
    found = [fail(OSError(errno.ENOSPC, "No space left", "file"), 1), fail(FormatError("bad"), 1), fail(KeyError(3), 0)]
    disk, ours, _ = found
    assert isinstance(disk, OSError)
    assert (disk.errno, disk.filename) == (errno.ENOSPC, "file")
    assert type(ours) is FormatError
    assert exchanged(1) == [1, 1]  # nobody is left behind
    return [str(error) for error in found]


def test_an_error_is_raised_on_all_with_its_rank_and_class() -> None:
    first, second = on_ranks(2, failures)
    assert first == second
    disk, ours, other = first
    assert "No space left (rank 1 on " in disk
    assert ours.startswith("bad (rank 1 on ")
    assert other.startswith("rank 0 on ")
    assert other.endswith(": KeyError: 3")
