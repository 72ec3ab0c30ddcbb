"""The micro-batch: some packed rows laid end to end as one row of N tokens, with everything a model and a loss need.

Shape legend: R rows, L tokens in a row, N = R * L, S segments, P pieces (segments and padding tails).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmt_shared.segments import IGNORE, Spans, expand
from llmt_train.attention import Backend, Segments


class PackedBatch(NamedTuple):
    """One micro-batch. A named tuple, because Lightning may rebuild what it moves or casts."""

    input_ids: Tensor
    """[1, N] int64."""
    labels: Tensor
    """[1, N] int64; already shifted: the label at t is token t + 1 of the same segment, else -100."""
    position_ids: Tensor
    """[1, N] int64; restarts at 0 with every piece."""
    cu_seqlens: Tensor
    """[P + 1] int32; borders of the pieces, from 0 to N."""
    max_seqlen: int
    """Tokens of the longest piece."""
    lengths: tuple[int, ...]
    """P lengths of the pieces, on the host: reading them from ``cu_seqlens`` would wait for the device."""
    segment_ids_flat: Tensor
    """[N] int32; the piece of each token, 0-based over the whole micro-batch: index of per-segment sums."""
    segment_source: Tensor
    """[P] int64; index of the piece's source; -1 for a padding tail."""
    label_places: Tensor
    """[T] int64; tokens that have a label. Found on the host: looking for them on the device would wait for it."""
    denominators: dict[str, float]
    """What the losses are divided by, each > 0, counted over the WHOLE optimizer step: see `Measure.per`."""
    row_places: tuple[int, ...] = ()
    """Place of each row in the run's order of rows: what is drawn for a row is a function of it."""
    pairs: Tensor | None = None
    """[Q, 2] int64; pieces of the chosen and the rejected side of each preference pair."""
    in_response: Tensor | None = None
    """[N] bool; where the label is a target of an answer; ``None`` where every label is."""
    reference_logps: Tensor | None = None
    """[Q, 2] fp64; log-probability of each side's targets under the reference; ``None`` without one."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """Return the same micro-batch with its tensors on a device (Lightning calls this)."""
        moved: dict[str, Any] = {
            name: x.to(device, non_blocking=non_blocking) for name, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(**moved)

    def segments(self, backend: Backend = "auto", deterministic: bool = False) -> Segments:
        """Return what attention reads: the borders of the pieces, and by which backend they are to be kept apart."""
        return Segments(self.lengths, self.cu_seqlens, self.segment_ids_flat, self.max_seqlen, backend, deterministic)


def collate(
    tokens: NDArray[np.integer],
    segments_per_row: NDArray[np.integer],
    lengths: NDArray[np.integer],
    sources: NDArray[np.integer],
    spans: Spans | None,
    denominators: dict[str, float],
    *,
    pairs: NDArray[np.integer] | None = None,
    with_chosen_prompts: bool = False,
    reference_logps: NDArray[np.float64] | None = None,
    row_places: tuple[int, ...] = (),
) -> PackedBatch:
    """Lay rows end to end.

    Args:
        tokens: [R, L], R >= 1.
        segments_per_row: [R]; their sum is S. All 0 makes a micro-batch of padding only, which has no label.
        lengths: [S] tokens of each segment, row by row.
        sources: [S] index of each segment's source.
        spans: the targets, counted from the first of the N tokens; ``None`` means every token.
        denominators: of the whole optimizer step; see ``PackedBatch``.
        pairs: [Q, 2] chosen and rejected segment, counted through all S.
        with_chosen_prompts: label the prompts of the chosen sides too, and say by ``in_response`` which labels are
            targets.
        reference_logps: [Q, 2]; see ``PackedBatch``.
        row_places: [R]; see ``PackedBatch``.

    Raises:
        ValueError: the lengths do not fit the rows.
    """
    ids = tokens.astype(np.int64)
    labelled, in_response = spans, None
    if with_chosen_prompts and pairs is not None and spans is not None:
        in_response = expand(ids, segments_per_row, lengths, spans).labels != IGNORE
        labelled = _with_whole(spans, pairs[:, 0], segments_per_row, lengths, ids.shape[1])
    dense = expand(ids, segments_per_row, lengths, labelled)
    piece_lengths = np.diff(dense.cu_seqlens)
    is_segment = dense.segment_ids[dense.cu_seqlens[:-1]] > 0
    piece_source = np.full(len(piece_lengths), -1, np.int64)
    piece_source[is_segment] = sources
    piece_of_segment = np.flatnonzero(is_segment)
    return PackedBatch(
        input_ids=torch.from_numpy(ids.reshape(1, -1)),
        labels=torch.from_numpy(dense.labels[None]),
        position_ids=torch.from_numpy(dense.position_ids[None]),
        cu_seqlens=torch.from_numpy(dense.cu_seqlens),
        max_seqlen=int(piece_lengths.max()),
        lengths=tuple(piece_lengths.tolist()),
        segment_ids_flat=torch.from_numpy(np.repeat(np.arange(len(piece_lengths), dtype=np.int32), piece_lengths)),
        segment_source=torch.from_numpy(piece_source),
        label_places=torch.from_numpy(np.flatnonzero(dense.labels != IGNORE)),
        denominators=denominators,
        row_places=row_places,
        pairs=None if pairs is None else torch.from_numpy(piece_of_segment[pairs]),
        in_response=None if in_response is None else torch.from_numpy(in_response),
        reference_logps=None if reference_logps is None else torch.from_numpy(reference_logps),
    )


def _with_whole(
    spans: Spans,
    segments: NDArray[np.integer],
    segments_per_row: NDArray[np.integer],
    lengths: NDArray[np.integer],
    row_length: int,
) -> Spans:
    """Make every token of some segments a target too; runs may overlap."""
    lengths = lengths.astype(np.int64)
    rows = np.repeat(np.arange(len(segments_per_row)), segments_per_row)
    ends = np.cumsum(lengths)
    before_row = np.concatenate([[0], ends])[np.cumsum(segments_per_row) - segments_per_row]
    start = rows * row_length + (ends - lengths) - before_row[rows]
    return Spans(np.append(spans.start, start[segments]), np.append(spans.length, lengths[segments]))
