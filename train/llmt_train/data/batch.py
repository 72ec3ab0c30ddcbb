"""The micro-batch: some packed rows laid end to end as one row of N tokens, with everything a model and a loss need.

Shape legend: R rows, L tokens in a row, N = R * L, S segments, P pieces (segments and padding tails).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmt_shared.segments import IGNORE, Pieces, Spans, label_places, labels, lay_out, position_ids
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
    segment_lengths: tuple[int, ...] = ()
    """S lengths of the segments alone, on the host: ``lengths`` without the padding tails."""

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
    pieces = lay_out(tokens.shape, segments_per_row, lengths, sources)
    return assemble(
        tokens,
        pieces,
        spans,
        denominators,
        pairs=pairs,
        with_chosen_prompts=with_chosen_prompts,
        reference_logps=reference_logps,
        row_places=row_places,
    )


def assemble(
    tokens: NDArray[np.integer],
    pieces: Pieces,
    spans: Spans | None,
    denominators: dict[str, float],
    *,
    pairs: NDArray[np.integer] | None = None,
    with_chosen_prompts: bool = False,
    reference_logps: NDArray[np.float64] | None = None,
    row_places: tuple[int, ...] = (),
) -> PackedBatch:
    """Do what `collate` does, from ``pieces`` that `lay_out` made."""
    flat = tokens.reshape(-1)
    labelled, in_response, pairs_of_pieces = spans, None, None
    if pairs is not None:
        pairs_of_pieces = np.flatnonzero(pieces.source >= 0)[pairs]
        if with_chosen_prompts and spans is not None:
            in_response = labels(flat, pieces, spans) != IGNORE
            labelled = _with_whole(spans, pieces, pairs_of_pieces[:, 0])
    found = labels(flat, pieces, labelled)
    piece_lengths = tuple(pieces.length.tolist())
    return PackedBatch(
        input_ids=torch.from_numpy(flat.astype(np.int64)[None]),
        labels=torch.from_numpy(found[None]),
        position_ids=torch.from_numpy(position_ids(pieces)[None]),
        cu_seqlens=torch.from_numpy(pieces.borders.astype(np.int32)),
        max_seqlen=max(piece_lengths),
        lengths=piece_lengths,
        segment_ids_flat=torch.from_numpy(np.arange(len(piece_lengths), dtype=np.int32).repeat(pieces.length)),
        segment_source=torch.from_numpy(pieces.source),
        label_places=torch.from_numpy(label_places(found, pieces, labelled)),
        denominators=denominators,
        row_places=row_places,
        segment_lengths=tuple(pieces.length[pieces.source >= 0].tolist()),
        pairs=None if pairs_of_pieces is None else torch.from_numpy(pairs_of_pieces),
        in_response=None if in_response is None else torch.from_numpy(in_response),
        reference_logps=None if reference_logps is None else torch.from_numpy(reference_logps),
    )


def _with_whole(spans: Spans, pieces: Pieces, whole: NDArray[np.integer]) -> Spans:
    """Make every token of some pieces a target too; runs may overlap."""
    start, length = pieces.borders[whole], pieces.length[whole]
    return Spans(np.append(spans.start, start), np.append(spans.length, length))
