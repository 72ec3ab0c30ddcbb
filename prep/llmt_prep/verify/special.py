"""Do control tokens stand where packing puts them: BOS before a document's first piece, EOS behind its last.

Shape legend: R rows of a block, L tokens of a row, S segments of these rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep.config import MixConfig
from llmt_prep.scan import Block
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_prep.verify.hits import Hit, by_segment, in_rows
from llmt_shared.order import mix


class Surroundings(NamedTuple):
    """What the mix and the tokenizer say of a document's beginning and end."""

    is_control: NDArray[np.bool_]
    """[max_id + 1]; all False where texts may hold control tokens."""
    bos_id: int | None
    """``None`` where documents have none."""
    eos_id: int | None
    """``None`` where documents have none."""
    overflow: str
    length: int
    pieces_join: bool
    """Whether a piece without EOS must have a next one: not where texts or truncation may end a piece otherwise."""


def surroundings(config: MixConfig, tokenizer: LoadedTokenizer) -> Surroundings:
    """Return what to expect around documents."""
    keeps = config.special_tokens_in_text == "keep"
    is_control = np.zeros(tokenizer.max_id + 1, np.bool_)
    if not keeps:
        is_control[sorted(tokenizer.control_ids)] = True
    has_bos = config.bos == "always" or (config.bos == "auto" and tokenizer.adds_bos)
    eos_id = tokenizer.eos_id if config.eos == "always" else None
    return Surroundings(
        is_control=is_control,
        bos_id=tokenizer.bos_id if has_bos else None,
        eos_id=eos_id,
        overflow=config.sequence.overflow,
        length=config.sequence.length,
        pieces_join=not keeps and eos_id is not None and config.sequence.overflow == "split",
    )


def special_token_hits(
    block: Block, tokens_RL: NDArray[np.integer], is_padding_RL: NDArray[np.bool_], expected: Surroundings
) -> Iterator[Hit]:
    """Check control tokens and the beginnings and ends of documents; all ids are known and segments fit their rows."""
    segments, tokens = block.segments, tokens_RL.ravel()
    starts, ends = borders(block, tokens_RL.shape[1])
    first, last, is_first = tokens[starts], tokens[ends], segments.offset == 0
    is_control = (expected.is_control[tokens_RL] & ~is_padding_RL).ravel()
    is_control[starts[is_first & (first == _id(expected.bos_id))]] = False
    is_control[ends[last == _id(expected.eos_id)]] = False
    misplaced = is_control.reshape(tokens_RL.shape).any(axis=1)
    yield from in_rows("F042", block.first_row, misplaced, "a control token that is no document's BOS or EOS")
    lacks = np.zeros(len(starts), np.bool_)
    if expected.bos_id is not None:
        lacks |= is_first & (first != expected.bos_id)
    if expected.eos_id is not None:
        lacks |= _must_end(block, expected) & (last != expected.eos_id)
    yield from by_segment("F043", block, lacks, "a document without the BOS or EOS that the mix asks for")
    later_piece = ~is_first if expected.overflow != "split" else np.zeros(len(starts), np.bool_)
    yield from by_segment(
        "F044", block, later_piece, f"a later piece of a document under overflow: {expected.overflow}"
    )


def piece_balance(block: Block, tokens_RL: NDArray[np.integer], expected: Surroundings) -> int:
    """Return a number whose sum over all blocks is 0 modulo 2^64 when every piece without EOS has its next piece.

    Each such piece adds a hash of (document, its end), each later piece takes away one of (document, its offset): equal
    multisets cancel, in any order and with repeats, and unequal ones do so with a chance of 2^-64.
    """
    if not expected.pieces_join:
        return 0
    segments = block.segments
    _, ends = borders(block, tokens_RL.shape[1])
    is_open = tokens_RL.ravel()[ends] != expected.eos_id
    is_later = segments.offset > 0
    end = segments.offset.astype(np.uint64) + segments.length
    opened = _hashes(segments.document[is_open], end[is_open])
    joined = _hashes(segments.document[is_later], segments.offset[is_later].astype(np.uint64))
    return int(opened.sum(dtype=np.uint64)) - int(joined.sum(dtype=np.uint64))


def borders(block: Block, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the [S] places of each segment's first and last token in the block's R * L tokens."""
    lengths = block.segments.length.astype(np.int64)
    past = np.cumsum(lengths)
    row = block.row - block.first_row
    first_of_row = np.cumsum(block.segments.per_row) - block.segments.per_row
    before_row = np.append(past - lengths, 0)[first_of_row[row]]  # tokens of the block before the segment's row
    ends = row * length + past - before_row - 1
    return ends - lengths + 1, ends


def _must_end(block: Block, expected: Surroundings) -> NDArray[np.bool_]:
    """[S] segments that end a document whatever comes: a full row under `truncate` may be cut, pieces may go on."""
    if expected.overflow == "split":
        return np.zeros(len(block.segments.length), np.bool_)
    if expected.overflow == "truncate":
        return block.segments.length < expected.length
    return np.ones(len(block.segments.length), np.bool_)


def _hashes(document: NDArray[np.uint64], position: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return mix(mix(document + np.uint64(1)) + position)


def _id(token_id: int | None) -> int:
    return -1 if token_id is None else token_id
