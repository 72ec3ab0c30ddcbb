"""Which documents are kept for validation: a function of their text alone."""

import numpy as np
from numpy.typing import NDArray

from llmt_prep.corpus import Columns
from llmt_shared.order import mix

HELD_OUT_SALT = 0x6C6C6D742D76616C
"""Changing it would move documents between training and validation."""


def held_out(text_hash: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Return which documents are kept for validation: a function of each hash alone, so duplicates stay together.

    Args:
        text_hash: [D] hashes of the raw text.
        fraction: of all hashes, in 0..1; 0 keeps none.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"a held-out fraction must lie in 0..1, not {fraction}")
    return mix(np.asarray(text_hash, np.uint64) ^ np.uint64(HELD_OUT_SALT)) < np.uint64(int(fraction * 2**64))


def held_out_of(corpus: Columns, first: int, last: int, fraction: float) -> NDArray[np.bool_]:
    """Return which of the documents ``first`` to ``last`` are kept for validation; reads no hash where all are not."""
    return held_out(corpus.text_hashes(first, last), fraction) if fraction else np.zeros(last - first, bool)
