"""Many lengths in a few numbers."""

import numpy as np
from numpy.typing import NDArray

from llmt_shared.config import StrictModel

QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}


class Lengths(StrictModel):
    """Lengths in tokens; all 0 where there is none."""

    p5: int
    p25: int
    p50: int
    p75: int
    p95: int
    max: int
    histogram: tuple[int, ...]
    """How many have 1, 2-3, 4-7, 8-15, .. tokens; the last bucket holds the row length."""


def summarized(lengths: NDArray[np.integer], counts: NDArray[np.integer], row_length: int) -> Lengths:
    """Summarize lengths.

    Args:
        lengths: [n] different ones, ascending.
        counts: [n] how often each occurs.
        row_length: the largest length there may be.
    """
    ends = np.cumsum(counts)
    # The quantile q is the smallest length that at least a share q of all do not exceed.
    at = {name: int(lengths[np.searchsorted(ends, q * ends[-1])]) if len(ends) else 0 for name, q in QUANTILES.items()}
    buckets = np.zeros(row_length.bit_length(), np.int64)
    np.add.at(buckets, np.frexp(lengths)[1][lengths > 0] - 1, counts[lengths > 0])
    return Lengths(**at, max=int(lengths[-1]) if len(ends) else 0, histogram=tuple(buckets.tolist()))


def counts_to_lengths(counts: NDArray[np.int64]) -> Lengths:
    """Summarize lengths by how often each occurs: [largest + 1]."""
    lengths = np.flatnonzero(counts)
    return summarized(lengths, counts[lengths], len(counts) - 1)
