"""What is trained on in the rows of chats and pairs: shares, lengths of turns and of both sides of pairs.

Counted are lengths, so memory is bounded by the length of a row.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmt_prep import scan
from llmt_prep.lengths import Lengths, counts_to_lengths
from llmt_prep.scan import Block
from llmt_shared.config import StrictModel
from llmt_shared.dataset import Split

_TOKENS_AT_ONCE = 1 << 22


class PairStats(StrictModel):
    """Preference pairs: tokens of one pair each."""

    pairs: int
    prompt: Lengths
    """Tokens before the first target of the chosen side."""
    chosen: Lengths
    """Of the chosen side, prompt included."""
    rejected: Lengths


class TargetStats(StrictModel):
    """Targets of one split."""

    share: float
    """Of the tokens."""
    spans: int
    """Runs of targets: turns that are trained on."""
    ends_turn: float
    """Share of the spans whose last token is a control token: the one that ends a turn. Of others the model would not
    learn to stop; truncating makes them."""
    lengths: Lengths
    """Of the spans, in tokens."""
    pairs: PairStats | None
    """``None`` but for preference data."""


def target_stats(split: Split, control_ids: NDArray[np.integer], *, has_pairs: bool) -> TargetStats:
    """Count the targets of a split of chats or pairs.

    Args:
        split: whose every row has spans.
        control_ids: of the tokenizer.
        has_pairs: of preference data.
    """
    tokens, most = split.arrays.open("tokens"), split.length + 1
    counts = {name: np.zeros(most, np.int64) for name in ("spans", "prompt", "chosen", "rejected")}
    ends = total = 0
    for block in scan.blocks(split.arrays, max(1, _TOKENS_AT_ONCE // split.length)):
        assert block.spans is not None, "of chats and pairs"
        rows = tokens[block.first_row : block.first_row + len(block.segments.per_row)]
        ends += _ending(block, rows, control_ids)
        total += int(block.segments.length.sum(dtype=np.int64))
        found: dict[str, NDArray[Any]] = {"spans": block.spans.length}
        found |= _sides(block, split.length) if has_pairs else {}
        for name, each in found.items():
            counts[name] += np.bincount(each, minlength=most)
    lengths = {name: counts_to_lengths(each) for name, each in counts.items()}
    spans, targets = int(counts["spans"].sum()), int(counts["spans"] @ np.arange(most))
    pairs = {name: lengths[name] for name in ("prompt", "chosen", "rejected")}
    return TargetStats(
        share=targets / max(1, total),
        spans=spans,
        ends_turn=ends / max(1, spans),
        lengths=lengths["spans"],
        pairs=PairStats(pairs=int(counts["chosen"].sum()), **pairs) if has_pairs else None,
    )


def _ending(block: Block, tokens_RL: NDArray[np.integer], control_ids: NDArray[np.integer]) -> int:
    """Spans whose last token is a control token."""
    assert block.spans is not None, "of chats and pairs"
    row = np.repeat(np.arange(len(block.spans.per_row)), block.spans.per_row)
    last = tokens_RL[row, block.spans.start.astype(np.int64) + block.spans.length - 1]
    return int(np.isin(last, control_ids).sum())


def _sides(block: Block, row_length: int) -> dict[str, NDArray[np.int64]]:
    """Tokens of both sides of each pair, and of the prompt before the first target of the chosen one."""
    assert block.spans is not None, "of pairs"
    length = block.segments.length.astype(np.int64)
    per_row = block.segments.per_row
    before_row = np.repeat(np.cumsum(per_row) - per_row, per_row)
    end = np.cumsum(length)
    row = block.row - block.first_row
    start = row * row_length + end - length - np.append(0, end)[before_row]
    span_row = np.repeat(np.arange(len(block.spans.per_row)), block.spans.per_row)
    place = span_row * row_length + block.spans.start
    first = place[np.searchsorted(place, start)]  # every side has a span, and they ascend
    return {"prompt": (first - start)[0::2], "chosen": length[0::2], "rejected": length[1::2]}
