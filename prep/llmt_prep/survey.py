"""What the corpus holds, source by source, from one pass over its lengths and text hashes.

Kept are totals and the borders of blocks of neighbouring documents, nothing of a single document. Blocks depend on the
lengths of their own source alone.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep.config import SequenceConfig
from llmt_prep.corpus import Columns
from llmt_prep.holdout import held_out_of
from llmt_prep.packing import Overflow, landing

PIECE = 1 << 18
"""Documents that are read at once; nothing depends on it but speed and memory."""

LIGHTEST = 512
"""A shorter document weighs as much as one of this many tokens, so that a block is bounded in documents too."""


@dataclass(frozen=True)
class Blocks:
    """A source's documents in store order, cut into B blocks of neighbours that are read together."""

    documents: NDArray[np.int64]
    """[B + 1]; first document of each block, then the first after the source: indices into the corpus."""
    tokens: NDArray[np.int64]
    """[B + 1]; address of each block's first token, then of the first after the source."""


@dataclass(frozen=True)
class SourceSurvey:
    """Totals of one source."""

    documents: int
    tokens: int
    held_out_documents: int
    held_out_tokens: int
    available: int
    """Tokens that land in rows, of the documents that are not held out."""
    too_long: int
    """Documents of more tokens than a row."""
    first_too_long: int
    """Index of the first of them in the corpus; -1 without one."""
    blocks: Blocks

    @property
    def trainable_documents(self) -> int:
        """Documents that are not held out."""
        return self.documents - self.held_out_documents


class _Place(NamedTuple):
    """Between two pieces of a source."""

    document: int
    """The next one, in the corpus."""
    address: int
    """Of its first token."""
    weight: int
    """Of the source's documents before it."""
    weight_before_last: int
    """The same for the document before it, which tells the block that goes on."""


def survey(
    corpus: Columns, source_borders: NDArray[np.int64], sequence: SequenceConfig, fraction: float, block_tokens: int
) -> tuple[SourceSurvey, ...]:
    """Read the lengths and text hashes of all documents once.

    Args:
        corpus: where to read them.
        source_borders: [sources + 1] first document of each source, then the number of documents.
        sequence: what lands in rows; `overflow: error` counts as `split` here, for the caller stops at long documents.
        fraction: of the documents that is held out.
        block_tokens: weight of a block, to which its last document may add, however long it is.
    """
    found: list[SourceSurvey] = []
    for first, last in pairwise(source_borders.tolist()):
        address = int(found[-1].blocks.tokens[-1]) if found else 0
        found.append(_survey_source(corpus, first, last, address, sequence, fraction, block_tokens))
    return tuple(found)


def _survey_source(
    corpus: Columns, first: int, last: int, address: int, sequence: SequenceConfig, fraction: float, block_tokens: int
) -> SourceSurvey:
    totals, first_too_long, borders = np.zeros(5, np.int64), -1, []
    place = _Place(first, address, 0, -block_tokens)  # no block goes on
    while place.document < last:
        start, end = place.document, min(place.document + PIECE, last)
        lengths = corpus.lengths(start, end)
        if first_too_long < 0 and lengths.max() > sequence.length:
            first_too_long = start + int((lengths > sequence.length).argmax())
        first_target = corpus.outlines(start, end)[:, 0]
        totals += _totals(lengths, first_target, held_out_of(corpus, start, end, fraction), sequence)
        starts, place = _block_starts(lengths, place, block_tokens)
        borders.append(starts)
    borders.append(np.array([[place.document], [place.address]]))
    tokens, held_out_documents, held_out_tokens, available, too_long = totals.tolist()
    return SourceSurvey(
        documents=last - first,
        tokens=tokens,
        held_out_documents=held_out_documents,
        held_out_tokens=held_out_tokens,
        available=available,
        too_long=too_long,
        first_too_long=first_too_long,
        blocks=Blocks(*np.concatenate(borders, axis=1)),
    )


def _totals(
    lengths: NDArray[np.int64],
    first_target: NDArray[np.uint32],
    is_held_out: NDArray[np.bool_],
    sequence: SequenceConfig,
) -> list[int]:
    """Tokens; held-out documents and their tokens; tokens available; documents that are too long."""
    overflow: Overflow = "split" if sequence.overflow == "error" else sequence.overflow
    lands = landing(lengths, sequence.length, overflow, first_target)
    return [
        lengths.sum(),
        is_held_out.sum(),
        lengths[is_held_out].sum(),
        lands.sum() - lands[is_held_out].sum(),
        (lengths > sequence.length).sum(),
    ]


def _block_starts(lengths: NDArray[np.int64], place: _Place, block_tokens: int) -> tuple[NDArray[np.int64], _Place]:
    """Document and address at which each block of a piece starts, [2, blocks], and where the next piece goes on."""
    ends = place.weight + np.cumsum(np.maximum(lengths, LIGHTEST))
    before = np.concatenate([[place.weight_before_last, place.weight], ends[:-1]])
    first = np.flatnonzero(np.diff(before // block_tokens))
    addresses = place.address + np.cumsum(lengths) - lengths
    following = _Place(
        document=place.document + len(lengths),
        address=int(addresses[-1] + lengths[-1]),
        weight=int(ends[-1]),
        weight_before_last=int(before[-1]),
    )
    return np.stack([place.document + first, addresses[first]]), following
