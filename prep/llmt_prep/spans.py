"""Targets of the token store to spans of rows: each segment gets the part of its document's spans that lies in it.

Shape legend: R rows, S segments of these rows, N spans.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep import mapped
from llmt_prep.corpus import Corpus
from llmt_prep.gather import Segments, places


class RowSpans(NamedTuple):
    """Runs of target tokens of whole rows, row after row."""

    per_row: NDArray[np.int64]
    """[R]"""
    start: NDArray[np.uint32]
    """[N]; first token, counted from the row's first."""
    length: NDArray[np.uint32]
    """[N]; at least 1; a span never crosses a segment nor holds its first token."""
    segment: NDArray[np.int64]
    """[N]; index of the segment."""


def spans_of_rows(segments: Segments, row_length: int, corpus: Corpus) -> RowSpans:
    """Return the spans of rows of ``row_length`` tokens.

    Args:
        segments: of these rows.
        row_length: tokens of a row.
        corpus: its units have targets.
    """
    segment, start, length = (np.concatenate(parts) for parts in zip(*_by_unit(segments, corpus), strict=True))
    order = np.argsort(segment, kind="stable")  # of one segment they ascend already
    segment, start, length = segment[order], start[order], length[order]
    place, _ = places(segments, row_length)
    row = np.repeat(np.arange(len(segments.per_row)), segments.per_row)[segment]
    return RowSpans(
        per_row=np.bincount(row, minlength=len(segments.per_row)).astype(np.int64),
        start=(place[segment] - row * row_length + start).astype(np.uint32),
        length=length.astype(np.uint32),
        segment=segment,
    )


def _by_unit(segments: Segments, corpus: Corpus) -> list[tuple[NDArray[np.int64], ...]]:
    """Segment, start in it and length of each span, unit after unit."""
    unit = np.searchsorted(corpus.document_borders, segments.document, "right") - 1
    order = np.argsort(unit, kind="stable")
    units, first = np.unique(unit[order], return_index=True)
    of_units = zip(units.tolist(), np.split(order, first[1:]), strict=True)
    return [_of_unit(segments, mine, each, corpus) for each, mine in of_units]


def _of_unit(
    segments: Segments, mine: NDArray[np.int64], unit: int, corpus: Corpus
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    stored = corpus.open_unit(unit)
    document = segments.document[mine] - corpus.document_borders[unit]
    first, count = stored.first_span[document], stored.first_span[document + 1] - stored.first_span[document]
    segment = np.repeat(mine, count)
    index = np.arange(len(segment)) - np.repeat(np.cumsum(count) - count - first, count)
    start = mapped.take(stored.span_start, index).astype(np.int64) - segments.offset[segment]
    end = start + mapped.take(stored.span_length, index)
    start, end = np.maximum(start, 1), np.minimum(end, segments.length[segment].astype(np.int64))
    kept = end > start  # the others lie in another segment of the document, or were cut off
    return segment[kept], start[kept], (end - start)[kept]
