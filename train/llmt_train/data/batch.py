"""The micro-batch: some packed rows laid end to end as one row of N tokens, with everything a model and a loss need.

Shape legend: R rows, L tokens in a row, N = R * L, n of them on this rank (n = N but for context parallel), S segments,
P pieces (segments and padding tails).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmt_shared.segments import IGNORE, Pieces, Spans, label_places, labels, lay_out, position_ids
from llmt_train.attention import Backend, Segments
from llmt_train.parallel.context import WHOLE, TokenSplit

Text = Sequence[int] | NDArray[np.int64]
"""Tokens."""


class PackedBatch(NamedTuple):
    """One micro-batch. A named tuple, because Lightning may rebuild what it moves or casts."""

    input_ids: Tensor
    """[1, n] int64."""
    labels: Tensor
    """[1, n] int64; already shifted: the label at t is token t + 1 of the same segment, else -100."""
    position_ids: Tensor
    """[1, n] int64; restarts at 0 with every piece; in padding it goes no further than in the longest segment."""
    cu_seqlens: Tensor
    """[P + 1] int32; borders of the pieces, from 0 to N."""
    max_seqlen: int
    """Tokens of the longest piece."""
    lengths: tuple[int, ...]
    """P lengths of the pieces, on the host: reading them from ``cu_seqlens`` would wait for the device."""
    segment_ids_flat: Tensor
    """[n] int32; the piece of each token, 0-based over the whole micro-batch: index of per-segment sums."""
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
    """[n] bool; where the label is a target of an answer; ``None`` where every label is."""
    reference_logps: Tensor | None = None
    """[Q, 2] fp64; log-probability of each side's targets under the reference; ``None`` without one."""
    segment_lengths: tuple[int, ...] = ()
    """S lengths of the segments alone, on the host: ``lengths`` without the padding tails."""
    split: TokenSplit = WHOLE
    """Ranks that share the N tokens. What is of tokens is of this rank's, what is of pieces or pairs of all."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """Return the same micro-batch with its tensors on a device (Lightning calls this)."""
        moved: dict[str, Any] = {
            name: x.to(device, non_blocking=non_blocking) for name, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(**moved)

    def segments(self, backend: Backend = "auto", deterministic: bool = False) -> Segments:
        """Return what attention reads: the borders of the pieces, and by which backend they are to be kept apart."""
        ids, cp = self.segment_ids_flat, self.split.cp
        if cp.size > 1:
            ids = torch.repeat_interleave(self.cu_seqlens.diff(), output_size=sum(self.lengths))
        return Segments(self.lengths, self.cu_seqlens, ids, self.max_seqlen, backend, deterministic, cp)


def shard_tokens(batch: PackedBatch, split: TokenSplit) -> PackedBatch:
    """Keep this rank's tokens of a whole micro-batch: n = N / cp consecutive ones.

    Args:
        batch: on the host: on a device this would wait for it.
        split: ranks that share the tokens; every one of them has this micro-batch.

    Raises:
        ValueError: the tokens do not divide by the ranks.
    """
    num_tokens, cp = sum(batch.lengths), split.cp
    if num_tokens % split.multiple:
        raise ValueError(f"{num_tokens} tokens do not divide by the {split.multiple} ranks that share them")
    first, last = (num_tokens * rank // cp.size for rank in (cp.rank, cp.rank + 1))
    places = batch.label_places
    return batch._replace(
        input_ids=batch.input_ids[:, first:last],
        labels=batch.labels[:, first:last],
        position_ids=batch.position_ids[:, first:last],
        segment_ids_flat=batch.segment_ids_flat[first:last],
        label_places=places[(places >= first) & (places < last)] - first,
        in_response=None if batch.in_response is None else batch.in_response[first:last],
        split=split,
    )


def pack_texts(texts: Sequence[Text], split: TokenSplit = WHOLE) -> PackedBatch:
    """Lay texts end to end, each a segment, for whoever asks a model about something else than a dataset's rows.

    Args:
        texts: tokens of each, one at least.
        split: ranks that share the tokens; padding follows as far as they need it.
    """
    ids, lengths = np.concatenate([np.asarray(text, np.int64) for text in texts]), np.array([len(x) for x in texts])
    ids_1N = np.pad(ids, (0, -len(ids) % split.multiple))[None]
    one_row, sources = np.array([len(texts)]), np.zeros(len(texts), np.int64)
    return shard_tokens(collate(ids_1N, one_row, lengths, sources, None, {"targets": 1.0}), split)


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
        position_ids=torch.from_numpy(_positions(pieces)[None]),
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


def _positions(pieces: Pieces) -> NDArray[np.int64]:
    """[N]; rotary factors may be chosen by the largest of them (Phi-3), which must not be that of padding."""
    longest = int(pieces.length[pieces.source >= 0].max(initial=1))
    return np.minimum(position_ids(pieces), longest - 1)


def _with_whole(spans: Spans, pieces: Pieces, whole: NDArray[np.integer]) -> Spans:
    """Make every token of some pieces a target too; runs may overlap."""
    start, length = pieces.borders[whole], pieces.length[whole]
    return Spans(np.append(spans.start, start), np.append(spans.length, length))
