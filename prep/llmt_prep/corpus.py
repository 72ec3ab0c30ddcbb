"""The tokenized input as one sequence of documents and one of tokens, over the units of the token store.

Document d of the corpus has `lengths[d]` tokens from token address `addresses[d]`. Units are in the order of sources,
files and places in the file, so all documents of a source, a file and a unit lie together.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmt_prep.store import StoreUnit, open_unit
from llmt_shared import durable


@dataclass(frozen=True)
class UnitEntry:
    """One unit of the token store, and its place in the whole."""

    directory: str
    source: int
    path: str
    """The input file, as the dataset calls it."""
    documents: int
    tokens: int
    file_document: int
    """Provenance number of the file's record 0: the records of all files before it."""
    records_before: int
    """Records (lines, rows) of the file that lie before the unit."""


@dataclass(frozen=True)
class Corpus:
    """All units; U of them."""

    units: tuple[UnitEntry, ...]
    num_sources: int

    @cached_property
    def document_borders(self) -> NDArray[np.int64]:
        """[U + 1] first document of each unit, then the number of documents."""
        return np.concatenate([[0], np.cumsum([unit.documents for unit in self.units], dtype=np.int64)])

    @cached_property
    def token_borders(self) -> NDArray[np.int64]:
        """[U + 1] first token address of each unit, then the number of tokens."""
        return np.concatenate([[0], np.cumsum([unit.tokens for unit in self.units], dtype=np.int64)])

    @cached_property
    def source_borders(self) -> NDArray[np.int64]:
        """[sources + 1] first document of each source, then the number of documents."""
        per_source = np.bincount(
            [unit.source for unit in self.units], [unit.documents for unit in self.units], self.num_sources
        )
        return np.concatenate([[0], np.cumsum(per_source)]).astype(np.int64)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[documents] tokens of each."""
        return self._column("lengths", np.dtype(np.int64))

    @cached_property
    def text_hashes(self) -> NDArray[np.uint64]:
        """[documents] hash of each raw text."""
        return self._column("text_hash", np.dtype(np.uint64))

    def _column(self, name: str, dtype: np.dtype) -> NDArray:  # type: ignore[type-arg]
        out = np.empty(self.document_borders[-1], dtype)
        for unit, start in zip(range(len(self.units)), self.document_borders, strict=False):
            column = getattr(self.open_unit(unit), name)
            out[start : start + len(column)] = column
        return out

    @cached_property
    def addresses(self) -> NDArray[np.int64]:
        """[documents] address of each one's first token."""
        return np.cumsum(self.lengths) - self.lengths

    def place(self, document: int) -> str:
        """Return where a document comes from: file and line (or row), from 1 as editors count."""
        unit = int(np.searchsorted(self.document_borders, document, "right")) - 1
        record = int(self.open_unit(unit).records[document - self.document_borders[unit]])
        return f"{self.units[unit].path}:{self.units[unit].records_before + record + 1}"

    def open_unit(self, unit: int) -> StoreUnit:
        """Map one unit's files; a bounded number stays open."""
        return _open(self.units[unit].directory)


@lru_cache(maxsize=32)  # each of up to four maps costs a file descriptor, of which a process may have only 256
def _open(directory: str) -> StoreUnit:
    return open_unit(Path(directory))


def close_units() -> None:
    """Forget opened units: one that was damaged is made again under the same name."""
    _open.cache_clear()


def save(corpus: Corpus, path: Path) -> None:
    """Write what shard tasks in other processes need to find tokens and provenance."""
    durable.write(path, json.dumps([asdict(unit) for unit in corpus.units]))


def load(path: Path, num_sources: int) -> Corpus:
    """Read a saved corpus; once in each process."""
    return _load(path, num_sources, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _load(path: Path, num_sources: int, version: int) -> Corpus:
    del version  # another corpus may come under the same name
    return Corpus(tuple(UnitEntry(**unit) for unit in json.loads(path.read_text())), num_sources)
