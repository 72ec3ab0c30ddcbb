"""Tokens of the store to rows: the one place where all tokens of a dataset pass through memory a second time.

Segments are copied in the order of their addresses, unit after unit, and a unit in windows, so that what is resident
depends neither on the sizes of units nor on their number.
"""

from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep import mapped
from llmt_prep.corpus import Corpus

WINDOW = 1 << 24
"""Tokens of a unit that lie between the first and the last segment copied at once: these pages are resident."""

_MANY_SEGMENTS = 500_000
"""Importing numba takes 0.3 s, as long as this many slices take to copy."""


class Segments(NamedTuple):
    """Segments of whole rows, row after row: S segments, R rows."""

    per_row: NDArray[np.int64]
    """[R]; at least 1."""
    length: NDArray[np.uint32]
    """[S] tokens."""
    offset: NDArray[np.uint32]
    """[S]; where in its document a segment starts."""
    document: NDArray[np.int64]
    """[S]; index into the corpus."""
    address: NDArray[np.int64]
    """[S]; of the first token, in the corpus."""


class Origin(NamedTuple):
    """Where segments come from, as the dataset says it."""

    document: NDArray[np.uint64]
    """[S]; provenance number."""
    source: NDArray[np.uint16]
    """[S]"""


def kernels_for(num_segments: int) -> ModuleType:
    """Return the loops to copy so many segments with; the bytes are the same with either."""
    from llmt_prep.kernels import gather_numpy

    if num_segments < _MANY_SEGMENTS:
        return gather_numpy
    try:
        from llmt_prep.kernels import gather
    except ImportError:  # no numba for this Python yet
        return gather_numpy
    return gather


def gather(rows: NDArray[np.integer], segments: Segments, corpus: Corpus, kernels: ModuleType) -> Origin:
    """Fill rows with their segments, one after another; the rest of a row becomes 0, whatever was there.

    Args:
        rows: [R, L], C order, of the corpus' token dtype.
        segments: of these rows; those of a row have at most L tokens.
        corpus: where the addresses lead.
        kernels: what `kernels_for` returns.
    """
    place, used = places(segments, rows.shape[1])
    kernels.clear_tails(rows, used)
    order = np.argsort(segments.address)  # equal addresses are copies of one segment: which is first does not matter
    address, document = segments.address[order], segments.document[order]
    place, length = place[order], segments.length[order]
    origin = Origin(np.empty(len(order), np.uint64), np.empty(len(order), np.uint16))
    for unit, mine in _windows(address, corpus.token_borders):
        tokens = corpus.open_unit(unit).tokens
        source = address[mine] - corpus.token_borders[unit]
        kernels.copy_segments(rows.reshape(-1), place[mine], tokens.view(np.ndarray), source, length[mine])
        mapped.release(tokens)
        origin.document[order[mine]] = _numbers(document[mine], unit, corpus)
        origin.source[order[mine]] = corpus.units["source"][unit]
    return origin


def places(segments: Segments, row_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each segment goes in the flat rows, [S], and the tokens of each row, [R]."""
    length = segments.length.astype(np.int64)
    first = np.cumsum(segments.per_row) - segments.per_row
    used = np.add.reduceat(length, first)
    before = np.cumsum(length) - length
    shift = np.arange(len(first)) * row_length - before[first]
    return before + np.repeat(shift, segments.per_row), used


def _windows(address: NDArray[np.int64], token_borders: NDArray[np.int64]) -> Iterator[tuple[int, slice]]:
    """Cut sorted addresses where a unit ends, and within it where they spread over `WINDOW`; yields (unit, which)."""
    unit_of = np.searchsorted(token_borders, address, "right") - 1  # not the other way: there may be millions of units
    cuts = [0, *(np.flatnonzero(np.diff(unit_of)) + 1).tolist(), len(address)] if len(address) else []
    for start, end in pairwise(cuts):
        stop = start
        while stop < end:
            first = stop
            stop += int(np.searchsorted(address[first:end], address[first] + WINDOW))
            yield int(unit_of[start]), slice(first, stop)


def _numbers(document: NDArray[np.int64], unit: int, corpus: Corpus) -> NDArray[np.uint64]:
    """Provenance numbers of documents of one unit."""
    records = corpus.open_unit(unit).records
    number: NDArray[np.uint64] = records[document - corpus.document_borders[unit]].astype(np.uint64)
    mapped.release(records)
    return number + np.uint64(corpus.units["first_record"][unit])
