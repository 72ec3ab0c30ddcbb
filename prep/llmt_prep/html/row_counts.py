"""How many rows have how many tokens and targets: exact, and bounded by the row length, not by the rows."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep import scan
from llmt_shared.dataset import Split

_SEGMENTS_AT_ONCE = 1 << 18
_MOST_BINS = 40
_FEWEST_VALUES = 10  # on an axis: a single bar says nothing of where it stands
_STRAY = 0.02


class RowCounts(NamedTuple):
    """L is the row length; entry n is the number of rows that have n of them."""

    tokens: NDArray[np.int64]
    """[L + 1]."""
    targets: NDArray[np.int64]
    """[L + 1]."""


class Bin(NamedTuple):
    """Rows whose number lies in ``first .. last``."""

    first: int
    last: int
    rows: int


class Bins(NamedTuple):
    """A histogram of equally wide bins; what lies far below them is gathered."""

    below: Bin | None
    """At most a fiftieth of the rows, or one row, where leaving them out halves the axis."""
    bins: tuple[Bin, ...]

    @property
    def width(self) -> int:
        """Of each bin; 1 where there is none."""
        return self.bins[0].last + 1 - self.bins[0].first if self.bins else 1


def row_counts(split: Split) -> RowCounts:
    """Count the rows of a split by their tokens and by their targets."""
    counts = RowCounts(np.zeros(split.length + 1, np.int64), np.zeros(split.length + 1, np.int64))
    rows_at_once = max(1, _SEGMENTS_AT_ONCE * len(split) // max(1, split.num_segments))
    for block in scan.blocks(split.arrays, rows_at_once):
        per_row = block.segments.per_row
        ends = np.append(0, np.cumsum(block.segments.length, dtype=np.int64))[np.append(0, np.cumsum(per_row))]
        targets = split.row_targets[block.first_row : block.first_row + len(per_row)]
        counts.tokens[:] += np.bincount(np.diff(ends), minlength=split.length + 1)
        counts.targets[:] += np.bincount(targets, minlength=split.length + 1)
    return counts


def bins(rows_with: NDArray[np.int64]) -> Bins:
    """Return a histogram that shows where nearly all rows are.

    Args:
        rows_with: [L + 1] one of the two of `RowCounts`; may be all 0, which gives no bin.
    """
    present = np.flatnonzero(rows_with)
    if not len(present):
        return Bins(None, ())
    low, high = int(present[0]), int(present[-1])
    usual = _lowest_usual(rows_with)
    if high - usual < (high - low) / 2:
        low = usual
    low = max(0, min(low, high + 1 - _FEWEST_VALUES))
    width = _round_width((high + 1 - low) / _MOST_BINS)
    starts = range(low // width * width, high + 1, width)
    found = tuple(Bin(first, first + width - 1, int(rows_with[first : first + width].sum())) for first in starts)
    rest = int(rows_with[: starts[0]].sum())
    return Bins(Bin(int(present[0]), starts[0] - 1, rest) if rest else None, found)


def _lowest_usual(rows_with: NDArray[np.int64]) -> int:
    """The lowest number once stray rows are left out."""
    rows = int(rows_with.sum())
    strays = min(max(1, int(rows * _STRAY)), rows - 1)
    return int(np.searchsorted(np.cumsum(rows_with), strays, "right"))


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, .. that is not below ``least``."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= least:
                return factor * power
        power *= 10
