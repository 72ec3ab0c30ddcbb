"""What became of every source's documents on their way into the rows of a split.

It is counted from what passes, and from the token store, independently of the mixture's own arithmetic: the ledger
compares the two.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmt_prep.corpus import Corpus
from llmt_prep.order import Documents
from llmt_prep.packing import Pieces
from llmt_shared import durable

_PIECE = 1 << 18  # documents whose lengths are read at once; a whole number of bytes of the map


@dataclass(frozen=True)
class Tally:
    """One source in one split; tokens unless it says documents."""

    documents: int
    """Selected documents, each counted as often as it was selected."""
    tokens: int
    distinct_documents: int
    distinct_tokens: int
    truncated: int
    dropped_documents: int
    dropped: int


@contextmanager
def counting(path: Path, corpus: Corpus) -> Iterator["Counter"]:
    """Give a counter; its map of seen documents, one bit for each, is a file of this name as long as the block runs."""
    with durable.writing(path) as file:  # with real zeros: a map that finds the disk full only later ends the process
        for start in range(0, corpus.num_documents, 8 * _PIECE):
            file.write(bytes(-(-min(8 * _PIECE, corpus.num_documents - start) // 8)))
    try:
        yield Counter(corpus, np.memmap(path, np.uint8, "r+"))
    finally:
        path.unlink()


class Counter:
    """Counts documents as they pass; `counting` gives one."""

    def __init__(self, corpus: Corpus, seen: NDArray[np.uint8]) -> None:
        self._corpus = corpus
        self._seen = seen
        self._sums = np.zeros((5, corpus.num_sources), np.int64)

    def add(self, documents: Documents, pieces: Pieces) -> None:
        """Count documents and the pieces that they were cut into."""
        index, lengths = documents.document, documents.length
        np.bitwise_or.at(self._seen, index >> 3, np.uint8(1) << (index & 7).astype(np.uint8))
        kept = np.bincount(pieces.document, pieces.length, len(index)).astype(np.int64)
        source = np.searchsorted(self._corpus.source_borders, index, "right") - 1
        gone = kept == 0
        counted = (np.ones_like(lengths), lengths, (lengths - kept) * ~gone, gone, lengths * gone)
        self._sums += [np.bincount(source, values, self._corpus.num_sources).astype(np.int64) for values in counted]

    def totals(self) -> list[Tally]:
        """Return what was counted, by source; reads the lengths of all documents once."""
        borders = pairwise(self._corpus.source_borders.tolist())
        return [
            self._tally(first, last, *sums) for (first, last), sums in zip(borders, self._sums.T.tolist(), strict=True)
        ]

    def _tally(
        self, first: int, last: int, documents: int, tokens: int, truncated: int, dropped_documents: int, dropped: int
    ) -> Tally:
        distinct_documents, distinct_tokens = self._distinct(first, last)
        return Tally(
            documents=documents,
            tokens=tokens,
            distinct_documents=distinct_documents,
            distinct_tokens=distinct_tokens,
            truncated=truncated,
            dropped_documents=dropped_documents,
            dropped=dropped,
        )

    def _distinct(self, first: int, last: int) -> tuple[int, int]:
        """Documents of a source that were seen, and their tokens."""
        documents = tokens = 0
        for start in range(first - first % 8, last, _PIECE):
            end = min(start + _PIECE, last)
            bits = np.unpackbits(self._seen[start // 8 : -(-end // 8)], count=end - start, bitorder="little")
            seen = bits[max(first - start, 0) :].astype(bool)
            documents += int(np.count_nonzero(seen))
            tokens += int(self._corpus.lengths(max(first, start), end)[seen].sum())
        return documents, tokens
