"""In which order an epoch takes a source's documents: blocks are permuted, then documents inside groups of blocks.

So reading needs one group at a time, and no order is ever held but that of one group: 12 bytes for each document of it,
20 of chats and pairs.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep.corpus import Columns
from llmt_prep.holdout import held_out_of
from llmt_prep.survey import Blocks
from llmt_shared.order import shuffled

PIECE = 1 << 14
"""Documents that are handed on at once; nothing depends on it but speed and memory."""


class Documents(NamedTuple):
    """Some documents of the corpus, in some order."""

    document: NDArray[np.int64]
    """[n]; index in the corpus."""
    length: NDArray[np.int64]
    """[n]; stored tokens."""
    address: NDArray[np.int64]
    """[n]; of the first token."""
    outline: NDArray[np.uint32]
    """[n, 2]; as `Columns.outlines` gives it."""


@dataclass(frozen=True)
class Shuffling:
    """What the order of documents depends on, apart from the documents."""

    seed: int
    block_tokens: int = 1 << 25
    """Weight of documents that are read together: 64 MB of two-byte tokens, and at most 65 536 documents."""
    group_tokens: int = 1 << 29
    """Weight of documents that are shuffled together: 1 GB; a source up to this size is shuffled fully."""


class _Group(NamedTuple):
    """The documents of some blocks, block after block: D of them, held-out ones too."""

    borders: NDArray[np.int64]
    """[blocks + 1]; first of each block, then D."""
    first_document: NDArray[np.int64]
    """[blocks]; of each, index in the corpus."""
    first_token: NDArray[np.int64]
    """[blocks]; of each, address."""
    length: NDArray[np.uint32]
    """[D]"""
    offset: NDArray[np.uint32]
    """[D]; tokens of the block before the document: less than a block weighs."""
    outline: NDArray[np.uint32]
    """[D, 2]"""
    order: NDArray[np.uint32]
    """[trainable]; places in the columns above, in the order of the epoch."""


def in_order(
    corpus: Columns, blocks: Blocks, fraction: float, name: str, shuffling: Shuffling, epoch: int
) -> Iterator[Documents]:
    """Yield the documents of an epoch of a source, each once, without the held-out ones.

    The order depends on the source's own documents and name, not on other sources.

    Args:
        corpus: where lengths and hashes are read, block by block.
        blocks: of the source.
        fraction: of the documents that is held out.
        name: of the source.
        shuffling: seed and sizes, with which the blocks were cut.
        epoch: from 0; each has its own order.
    """
    keys = (shuffling.seed, _key_of(name), epoch)
    order = shuffled(len(blocks.documents) - 1, *keys, 0)
    per_group = max(1, shuffling.group_tokens // shuffling.block_tokens)
    for start in range(0, len(order), per_group):
        chosen = order[start : start + per_group]
        yield from _pieces(_read_group(corpus, blocks, chosen, fraction, (*keys, 1 + start)))


def held_out_in_order(corpus: Columns, num_documents: int, fraction: float) -> Iterator[Documents]:
    """Yield the held-out documents of all sources in store order."""
    address = 0
    for first in range(0, num_documents, PIECE):
        last = min(first + PIECE, num_documents)
        lengths = corpus.lengths(first, last)
        ends = address + np.cumsum(lengths)
        kept = np.flatnonzero(held_out_of(corpus, first, last, fraction))
        if kept.size:
            yield Documents(first + kept, lengths[kept], (ends - lengths)[kept], corpus.outlines(first, last)[kept])
        address = int(ends[-1])


def _read_group(
    corpus: Columns, blocks: Blocks, chosen: NDArray[np.int64], fraction: float, keys: tuple[int, ...]
) -> _Group:
    lengths, offsets, outlines, trainable = [], [], [], []
    borders = np.zeros(len(chosen) + 1, np.int64)
    np.cumsum(blocks.documents[chosen + 1] - blocks.documents[chosen], out=borders[1:])
    for border, first, last in zip(borders, blocks.documents[chosen], blocks.documents[chosen + 1], strict=False):
        length = corpus.lengths(int(first), int(last))
        lengths.append(length.astype(np.uint32))
        offsets.append((np.cumsum(length) - length).astype(np.uint32))
        outlines.append(corpus.outlines(int(first), int(last)))
        is_trainable = ~held_out_of(corpus, int(first), int(last), fraction)
        trainable.append((border + np.flatnonzero(is_trainable)).astype(np.uint32))
    places = np.concatenate(trainable)
    return _Group(
        borders,
        blocks.documents[chosen],
        blocks.tokens[chosen],
        np.concatenate(lengths),
        np.concatenate(offsets),
        _joined(outlines),
        places[shuffled(len(places), *keys)],
    )


def _pieces(group: _Group) -> Iterator[Documents]:
    for start in range(0, len(group.order), PIECE):
        places = group.order[start : start + PIECE]
        block = np.searchsorted(group.borders, places, "right") - 1
        yield Documents(
            document=group.first_document[block] + (places - group.borders[block]),
            length=group.length[places].astype(np.int64),
            address=group.first_token[block] + group.offset[places],
            outline=group.outline[places],
        )


def _joined(outlines: list[NDArray[np.uint32]]) -> NDArray[np.uint32]:
    """The outlines one after another; those that take no memory still take none."""
    if all(not any(each.strides) for each in outlines):
        return np.broadcast_to(np.uint32(0), (sum(map(len, outlines)), 2))
    return np.concatenate(outlines)


def _key_of(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
