"""The tokenized input as one sequence of documents and one of tokens, over the units of the token store.

The documents, and their tokens, are numbered through all units: a token's number is its address. Units are in the order
of sources, files and places in the file, so all documents of a source, a file and a unit lie together. Nothing is kept
for a document: what is asked of some neighbours is read from the store, and leaves no mapped pages behind.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmt_prep.store import StoreUnit, open_unit, read_column
from llmt_shared import durable
from llmt_shared.errors import DataError


class Columns(Protocol):
    """What planning reads of the documents: `Corpus`, or arrays in a test."""

    def lengths(self, first: int, last: int) -> NDArray[np.int64]:
        """Tokens of each of the documents ``first`` to ``last``."""

    def text_hashes(self, first: int, last: int) -> NDArray[np.uint64]:
        """Hash of the raw text of each of the documents ``first`` to ``last``."""

    def outlines(self, first: int, last: int) -> NDArray[np.uint32]:
        """[n, 2]: `first_target` and `chosen_length` of each (see `Targets`); 0 where every token is a target."""


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
    has_targets: bool
    """As in `UnitMeta`; alike in all units of a corpus."""
    content: str
    """`UnitMeta.content`: a plan made of one content must not be gathered from another."""


@dataclass(frozen=True)
class Corpus:
    """All units; U of them."""

    units: tuple[UnitEntry, ...]
    num_sources: int

    @property
    def num_documents(self) -> int:
        """Documents of all sources."""
        return int(self.document_borders[-1])

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

    def lengths(self, first: int, last: int) -> NDArray[np.int64]:
        """Read the tokens of each of the documents ``first`` to ``last``: [last - first]."""
        return self._read("lengths", first, last).astype(np.int64)

    def text_hashes(self, first: int, last: int) -> NDArray[np.uint64]:
        """Read the hash of the raw text of each of the documents ``first`` to ``last``: [last - first]."""
        return self._read("text_hash", first, last)

    def outlines(self, first: int, last: int) -> NDArray[np.uint32]:
        """Read `first_target` and `chosen_length` of the documents: [last - first, 2]; no memory where all are 0."""
        if not self.units[0].has_targets:
            return np.broadcast_to(np.uint32(0), (last - first, 2))
        return np.stack([self._read(column, first, last) for column in ("first_target", "chosen_length")], axis=1)

    def _read(self, column: str, first: int, last: int) -> NDArray[Any]:
        parts = []
        unit = int(np.searchsorted(self.document_borders, first, "right")) - 1
        while first < last:
            start, past = self.document_borders[unit : unit + 2].tolist()
            end = min(last, past)
            parts.append(read_column(Path(self.units[unit].directory), column, first - start, end - first))
            first, unit = end, unit + 1
        return np.concatenate(parts)

    def place(self, document: int) -> str:
        """Return where a document comes from: file and line (or row), from 1 as editors count."""
        unit = int(np.searchsorted(self.document_borders, document, "right")) - 1
        record = int(self.open_unit(unit).records[document - self.document_borders[unit]])
        return f"{self.units[unit].path}:{self.units[unit].records_before + record + 1}"

    def open_unit(self, unit: int) -> StoreUnit:
        """Map one unit's files; a bounded number stays open."""
        return _open(self.units[unit].directory, self.units[unit].content)


@lru_cache(maxsize=32)  # each of up to four maps costs a file descriptor, of which a process may have only 256
def _open(directory: str, content: str) -> StoreUnit:
    unit = open_unit(Path(directory))
    if unit.meta.content != content:
        raise DataError(
            f"{directory}: another run made this unit again, with other content; run the same command again"
        )
    return unit


def close_units() -> None:
    """Forget opened units: one that was damaged is made again under the same name."""
    _open.cache_clear()


def is_saved(corpus: Corpus, path: Path) -> bool:
    """Whether `save` wrote the same corpus there."""
    return path.exists() and path.read_text() == _text(corpus)


def save(corpus: Corpus, path: Path) -> None:
    """Write what shard tasks in other processes need to find tokens and provenance."""
    durable.write(path, _text(corpus))


def _text(corpus: Corpus) -> str:
    return json.dumps([asdict(unit) for unit in corpus.units])


def load(path: Path, num_sources: int) -> Corpus:
    """Read a saved corpus; once in each process."""
    return _load(path, num_sources, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _load(path: Path, num_sources: int, version: int) -> Corpus:
    del version  # another corpus may come under the same name
    return Corpus(tuple(UnitEntry(**unit) for unit in json.loads(path.read_text())), num_sources)
