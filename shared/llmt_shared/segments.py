"""From a packed row and its segment lengths to what a model reads. The one place where these rules are written.

A row is L tokens: its segments one after another, then padding. Rows of a micro-batch are laid end to end, and the
padding tail of a row, where there is one, is a piece of its own: kernels leave nothing undefined, and no token of
one row or segment ever sees another.

Shape legend: R rows, L tokens in a row, N = R * L, S segments of these rows, P pieces (segments and padding tails).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""Label of a token that predicts nothing: padding, the last token of a segment, and what is no target."""


class Spans(NamedTuple):
    """Runs of target tokens, in order, never crossing a segment: ``start`` counts from the first of the N tokens."""

    start: NDArray[np.int64]
    length: NDArray[np.int64]


class Expanded(NamedTuple):
    """Model inputs of R rows laid end to end."""

    segment_ids: NDArray[np.int32]
    """[N]; 1, 2, ... within each row, 0 for padding."""
    position_ids: NDArray[np.int64]
    """[N]; index within the piece: restarts at 0, so that rotary embeddings never see the row."""
    cu_seqlens: NDArray[np.int32]
    """[P + 1]; borders of the pieces, from 0 to N."""
    labels: NDArray[np.int64]
    """[N]; the next token of the same segment where that is a target, else ``IGNORE``."""


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
        spans: the targets; ``None`` means every token. A segment's first token is never a target, for nothing
            before it predicts it.

    Raises:
        ValueError: the lengths do not fit the rows.

    Source: packing without cross-contamination, Krell et al. 2021, arXiv:2107.02027.
    """
    num_rows, row_length = tokens.shape
    row_of_segment = np.repeat(np.arange(num_rows), segments_per_row)
    real = np.bincount(row_of_segment, weights=lengths, minlength=num_rows).astype(np.int64)
    if len(lengths) != len(row_of_segment) or (real > row_length).any():
        raise ValueError(f"segments of {real.max(initial=0)} tokens do not fit a row of {row_length}")
    pieces, is_padding = _pieces(row_length, real, row_of_segment, np.asarray(lengths, np.int64))
    starts = np.cumsum(pieces) - pieces
    position_ids = np.arange(tokens.size) - np.repeat(starts, pieces)
    first_of_row = np.cumsum(segments_per_row) - segments_per_row
    ids = np.zeros(len(pieces), np.int32)
    ids[~is_padding] = np.arange(len(lengths)) - first_of_row[row_of_segment] + 1
    return Expanded(
        segment_ids=np.repeat(ids, pieces),
        position_ids=position_ids,
        cu_seqlens=np.append(starts, tokens.size).astype(np.int32),
        labels=_labels(tokens.ravel(), position_ids, np.repeat(is_padding, pieces), spans),
    )


def _pieces(
    row_length: int, real: NDArray[np.int64], row_of_segment: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Segment lengths with each row's padding tail after its segments, and which of them are padding."""
    padded_rows = np.flatnonzero(real < row_length)
    rows = np.concatenate([row_of_segment, padded_rows])
    order = np.argsort(rows, kind="stable")  # tails come last in `rows`, so they stay behind their row's segments
    pieces = np.concatenate([lengths, row_length - real[padded_rows]])[order]
    return pieces, (np.arange(len(rows)) >= len(lengths))[order]


def _labels(
    tokens: NDArray[np.integer], position_ids: NDArray[np.int64], is_padding: NDArray[np.bool_], spans: Spans | None
) -> NDArray[np.int64]:
    is_target = (position_ids > 0) & ~is_padding
    if spans is not None:
        is_target &= _inside(spans, tokens.size)
    labels = np.full(tokens.size, IGNORE, np.int64)
    wide = tokens[1:].astype(np.int64)  # `where` would cast IGNORE to the narrow unsigned type of the tokens
    labels[:-1] = np.where(is_target[1:], wide, IGNORE)  # the token before a target predicts it
    return labels


def _inside(spans: Spans, size: int) -> NDArray[np.bool_]:
    edges = np.zeros(size + 1, np.int8)
    np.add.at(edges, spans.start, 1)
    np.add.at(edges, spans.start + spans.length, -1)
    return np.cumsum(edges[:-1], dtype=np.int8).astype(bool)


def count_targets(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Targets of segments whose every token is one: [S]; the first token of a segment is none."""
    return np.maximum(np.asarray(lengths, np.int64) - 1, 0)
