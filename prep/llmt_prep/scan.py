"""A split's segments read in order, some rows at a time: memory does not grow with the dataset."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_shared.chunks import ArrayFolder, ChunkedArray
from llmt_shared.dataset import SegmentTable


class BlockSpans(NamedTuple):
    """Runs of targets of R rows, row after row: N of them."""

    per_row: NDArray[np.int64]
    """[R]"""
    start: NDArray[np.uint32]
    """[N]; counted from the row's first token."""
    length: NDArray[np.uint32]
    """[N]"""


class Block(NamedTuple):
    """Successive rows: R of them with S segments."""

    first_row: int
    segments: SegmentTable
    spans: BlockSpans | None
    """``None`` where every token is a target."""
    has_pairs: bool
    """Each two successive segments are the sides of a preference pair."""

    @property
    def row(self) -> NDArray[np.int64]:
        """[S] number of each segment's row in the split."""
        per_row = self.segments.per_row
        return np.repeat(np.arange(self.first_row, self.first_row + len(per_row)), per_row)

    @property
    def begins_document(self) -> NDArray[np.bool_]:
        """[S]; of a pair the chosen side does, even where its prompt is cut from the left."""
        offset = self.segments.offset
        return np.equal(np.arange(len(offset)) % 2 if self.has_pairs else offset, 0)


def blocks(split: ArrayFolder, rows_at_once: int) -> Iterator[Block]:
    """Yield a split's segments and spans in blocks of so many rows; row_offsets and span_offsets must ascend.

    Args:
        split: its arrays.
        rows_at_once: rows of a block; the last may have fewer.
    """
    row_offsets = split.open("row_offsets")
    columns = [split.open(f"segment_{name}") for name in SegmentTable._fields[1:]]
    names = ("span_offsets", "span_start", "span_length")
    spans = [split.open(name) for name in names] if split.has("span_offsets") else []
    has_pairs = split.has("pair_offsets")
    for first in range(0, len(row_offsets) - 1, rows_at_once):
        borders = row_offsets[first : first + rows_at_once + 1]
        mine = slice(int(borders[0]), int(borders[-1]))
        segments = SegmentTable(np.diff(borders), *(column[mine] for column in columns))
        rows = slice(first, first + rows_at_once + 1)
        yield Block(first, segments, _spans(spans, rows) if spans else None, has_pairs)


def _spans(arrays: list[ChunkedArray], rows: slice) -> BlockSpans:
    offsets, start, length = arrays
    borders = offsets[rows]
    mine = slice(int(borders[0]), int(borders[-1]))
    return BlockSpans(np.diff(borders), start[mine], length[mine])
