"""From a packed row and its segment lengths to what a model reads. The one place where these rules are written.

A row is L tokens: its segments one after another, then padding. Rows of a micro-batch are laid end to end, and the
padding tail of a row, where there is one, is a piece of its own: kernels leave nothing undefined, and no token of
one row or segment ever sees another.

Shape legend: R rows, L tokens in a row, N = R * L, S segments of these rows, P pieces (segments and padding tails).
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""Label of a token that predicts nothing: padding, the last token of a segment, and what is no target."""


class Spans(NamedTuple):
    """Runs of target tokens, in order, never crossing a segment: ``start`` counts from the first of the N tokens."""

    start: NDArray[np.int64]
    length: NDArray[np.int64]


class Pieces(NamedTuple):
    """Segments and padding tails of R rows laid end to end, in their order."""

    per_row: NDArray[np.int64]
    """[R]"""
    borders: NDArray[np.int64]
    """[P + 1]; first token of each piece, and N."""
    length: NDArray[np.int64]
    """[P] tokens, at least 1."""
    source: NDArray[np.int64]
    """[P] index of the segment's source; -1 is padding."""

    def parts(self, num_rows: int) -> Iterator["Pieces"]:
        """Yield those of the first ``num_rows`` rows, then those of the next, and so on, each counted from 0."""
        ends = [0, *self.per_row.cumsum().tolist()]
        for row in range(0, len(self.per_row), num_rows):
            first, stop = ends[row], ends[min(row + num_rows, len(self.per_row))]
            borders = self.borders[first : stop + 1] - self.borders[first]
            per_row = self.per_row[row : row + num_rows]
            yield Pieces(per_row, borders, self.length[first:stop], self.source[first:stop])


class Expanded(NamedTuple):
    """Model inputs of R rows laid end to end."""

    segment_ids: NDArray[np.int32]
    """[N]; 1, 2, ... within each row, 0 for padding."""
    position_ids: NDArray[np.int64]
    """[N]; see `position_ids`."""
    cu_seqlens: NDArray[np.int32]
    """[P + 1]; borders of the pieces, from 0 to N."""
    labels: NDArray[np.int64]
    """[N]; see `labels`."""


def expand(
    tokens: NDArray[np.integer],
    segments_per_row: NDArray[np.integer],
    lengths: NDArray[np.integer],
    spans: Spans | None = None,
) -> Expanded:
    """Derive everything dense from the compressed form on disk.

    Args:
        tokens: [R, L].
        segments_per_row: [R]; their sum is S. A row may hold none.
        lengths: [S] tokens of each segment, row by row; those of a row sum to at most L.
        spans: the targets; ``None`` means every token.

    Raises:
        ValueError: the lengths do not fit the rows.

    Source: packing without cross-contamination, Krell et al. 2021, arXiv:2107.02027.
    """
    pieces = lay_out(tokens.shape, segments_per_row, lengths, np.zeros(len(lengths), np.int64))
    first_of_row = np.cumsum(segments_per_row) - segments_per_row
    ids = np.zeros(len(pieces.length), np.int32)
    ids[pieces.source >= 0] = np.arange(len(lengths)) - np.repeat(first_of_row, segments_per_row) + 1
    return Expanded(
        segment_ids=np.repeat(ids, pieces.length),
        position_ids=position_ids(pieces),
        cu_seqlens=pieces.borders.astype(np.int32),
        labels=labels(tokens.reshape(-1), pieces, spans),
    )


def lay_out(
    shape: tuple[int, ...],
    segments_per_row: NDArray[np.integer],
    lengths: NDArray[np.integer],
    sources: NDArray[np.integer],
) -> Pieces:
    """Put each row's padding behind its segments.

    Args:
        shape: [R, L].
        segments_per_row: as in `expand`, which raises what this raises.
        lengths: as in `expand`.
        sources: [S] index of each segment's source.
    """
    (num_rows, row_length), num_segments = shape, len(lengths)
    if len(segments_per_row) != num_rows or segments_per_row.sum() != num_segments:
        raise ValueError(f"{num_segments} lengths and {len(segments_per_row)} numbers of segments for {num_rows} rows")
    tails = np.cumsum(segments_per_row) + np.arange(num_rows)  # a place for padding in each row, used or not
    source = np.zeros(num_segments + num_rows, np.int64)
    source[tails] = -1
    is_segment = source == 0
    source[is_segment] = sources
    length = np.zeros(num_segments + num_rows, np.int64)
    length[is_segment] = lengths
    real = np.add.reduceat(length, tails - segments_per_row)
    if (real > row_length).any():
        raise ValueError(f"segments of {real.max()} tokens do not fit a row of {row_length}")
    length[tails] = row_length - real
    is_used = length > 0
    borders = np.append(0, np.cumsum(length[is_used]))
    return Pieces(segments_per_row.astype(np.int64) + (real < row_length), borders, length[is_used], source[is_used])


def position_ids(pieces: Pieces) -> NDArray[np.int64]:
    """Return each token's index within its piece, [N]: it restarts at 0, so rotary embeddings never see the row."""
    return ranges(np.zeros(len(pieces.length), np.int64), pieces.length)


def labels(tokens: NDArray[np.integer], pieces: Pieces, spans: Spans | None) -> NDArray[np.int64]:
    """Return the next token of the same segment where that is a target, else ``IGNORE``: [N].

    A segment's first token is never a target, for nothing before it predicts it.
    """
    found = np.empty(len(tokens), np.int64)
    found[:-1] = tokens[1:]
    found[pieces.borders[1:] - 1] = IGNORE
    for piece in (pieces.source < 0).nonzero()[0].tolist():
        found[pieces.borders[piece] : pieces.borders[piece + 1]] = IGNORE
    if spans is not None:
        found[:-1][~_inside(spans, len(tokens))[1:]] = IGNORE
    return found


def label_places(found: NDArray[np.int64], pieces: Pieces, spans: Spans | None) -> NDArray[np.int64]:
    """Return the places of the labels that `labels` found, in order; without spans nobody has to look for them."""
    if spans is not None:
        return np.flatnonzero(found != IGNORE)
    return ranges(pieces.borders[:-1], (pieces.length - 1) * (pieces.source >= 0))


def ranges(first: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``count[i]`` numbers from ``first[i]`` on, for each i, one after another.

    >>> ranges(np.array([7, 0]), np.array([2, 3])).tolist()
    [7, 8, 0, 1, 2]
    """
    numbers: NDArray[np.int64] = (first - (count.cumsum() - count)).repeat(count)  # type: ignore[assignment]
    numbers += _counting(len(numbers))
    return numbers


def count_targets(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Targets of segments whose every token is one: [S]; the first token of a segment is none."""
    return np.maximum(np.asarray(lengths, np.int64) - 1, 0)


def _inside(spans: Spans, size: int) -> NDArray[np.bool_]:
    edges = np.zeros(size + 1, np.int8)
    np.add.at(edges, spans.start, 1)
    np.add.at(edges, spans.start + spans.length, -1)
    return np.cumsum(edges[:-1], dtype=np.int8).astype(bool)


def _counting(size: int) -> NDArray[np.int64]:
    """0, 1, .. size - 1; kept, for making it takes as long as using it."""
    return _counting_to(1 << (size - 1).bit_length())[:size]


@cache
def _counting_to(size: int) -> NDArray[np.int64]:
    numbers = np.arange(size)
    numbers.flags.writeable = False
    return numbers
