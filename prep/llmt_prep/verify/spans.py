"""Do the targets of chats and pairs lie where FORMAT.md says: spans inside segments, pairs of neighbours.

Shape legend: R rows of a block, L tokens of a row, S segments of these rows, N spans.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llmt_prep.scan import Block
from llmt_prep.verify.findings import Finding, finding
from llmt_prep.verify.hits import Hit, by_segment, in_rows
from llmt_prep.verify.special import borders
from llmt_shared.chunks import ArrayFolder

_ROWS_AT_ONCE = 1 << 20


def span_hits(block: Block, length: int) -> Iterator[Hit]:
    """Check the spans of rows whose segments fit them."""
    assert block.spans is not None, "of chats and pairs"
    starts, ends = borders(block, length)
    row = np.repeat(np.arange(len(block.spans.per_row)), block.spans.per_row)
    begin = row * length + block.spans.start
    end = begin + block.spans.length
    segment = np.searchsorted(starts, begin, "right") - 1
    is_inside = (segment >= 0) & (block.spans.length > 0)
    is_inside &= (begin > np.append(starts, -1)[segment]) & (end <= np.append(ends, -1)[segment] + 1)
    overlaps = begin < np.concatenate([[0], end])[:-1]
    is_wrong = np.bincount(row, ~is_inside | overlaps, len(block.spans.per_row)) > 0
    message = "a span that is not inside one segment, behind its first token and behind the span before"
    yield from in_rows("F027", block.first_row, is_wrong, message)
    has_target = np.bincount(segment[is_inside], minlength=len(starts)) > 0
    yield from by_segment("F027", block, ~has_target, "a segment without a target")


def pair_hits(block: Block) -> Iterator[Hit]:
    """Check that the segments of each row are pairs."""
    is_odd = block.segments.per_row % 2 == 1
    yield from in_rows("F028", block.first_row, is_odd, "an odd number of segments")
    if not is_odd.any():
        document, offset = block.segments.document, block.segments.offset.astype(np.int64)
        differs = np.repeat(document[0::2] != document[1::2], 2)
        yield from by_segment("F028", block, differs, "two sides of different documents")
        end = offset + block.segments.length
        is_apart = np.repeat(offset[1::2] != end[0::2] + offset[0::2], 2)  # as much is cut from the one as the other
        yield from by_segment("F028", block, is_apart, "sides that do not follow each other in their document")


def chosen_targets(block: Block, length: int) -> NDArray[np.int64]:
    """Return the targets on the chosen sides of each row: [R]."""
    assert block.spans is not None, "of pairs"
    starts, _ = borders(block, length)
    row = np.repeat(np.arange(len(block.spans.per_row)), block.spans.per_row)
    segment = np.searchsorted(starts, row * length + block.spans.start, "right") - 1
    is_chosen = segment % 2 == 0  # a block has whole rows, and rows have whole pairs
    return np.bincount(row, block.spans.length * is_chosen, len(block.spans.per_row)).astype(np.int64)


def pair_findings(split: ArrayFolder) -> list[Finding]:
    """Check that each two neighbouring segments are a pair, in `pair_offsets` and in `pair_segments`."""
    pairs, pair_offsets = split.open("pair_segments"), split.open("pair_offsets")
    row_offsets = split.open("row_offsets")
    for start in range(0, len(row_offsets), _ROWS_AT_ONCE):
        mine = slice(start, start + _ROWS_AT_ONCE)
        if not np.array_equal(pair_offsets[mine], row_offsets[mine] // 2):  # rows of odd numbers are found elsewhere
            return [finding("F028", f"{split.path.name}/pair_offsets", "is not half of row_offsets")]
    wanted, place = int(row_offsets[len(row_offsets) - 1 :][0]) // 2, f"{split.path.name}/pair_segments"
    if len(pairs) != wanted:
        return [finding("F028", place, f"{len(pairs)} pairs; wanted {wanted}, all segments")]
    for start in range(0, len(pairs), _ROWS_AT_ONCE):
        part = pairs[start : start + _ROWS_AT_ONCE]
        if not np.array_equal(part.ravel(), np.arange(2 * start, 2 * (start + len(part)))):
            return [finding("F028", place, "does not name each segment once, in order")]
    return []
