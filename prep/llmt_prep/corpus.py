"""The tokenized input as one sequence of documents and one of tokens, over the units of the token store.

The documents, and their tokens, are numbered through all units: a token's number is its address. Units are in the order
of sources, files and places in the file, so all documents of a source, a file and a unit lie together. Nothing is kept
for a document: what is asked of some neighbours is read from the store, and leaves no mapped pages behind. What is kept
of a unit are `UNIT` and two borders; other processes map the files in which `save` writes them.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmt_prep.store import COUNTED, StoreUnit, UnitMeta, open_unit, read_column, unit_folder
from llmt_shared import durable
from llmt_shared.errors import DataError

UNIT = np.dtype(
    [("key", "V32"), ("content", "<u8"), ("first_record", "<i8"), ("source", "<u2"), ("folder", "<u2"), ("bad", "?")]
)
"""One unit: first its name in the token store; its `UnitMeta.content`; the provenance number of its record 0; its
source; in which of the corpus' folders it lies; whether it has a quarantine."""

SAVED_BYTES = UNIT.itemsize + 2 * 8
"""Of a saved corpus, for each unit: its borders, too."""

_UNITS, _DOCUMENTS, _TOKENS, _NOTE = "units.bin", "documents.bin", "tokens.bin", "corpus.json"


class Columns(Protocol):
    """What planning reads of the documents: `Corpus`, or arrays in a test."""

    def lengths(self, first: int, last: int) -> NDArray[np.int64]:
        """Tokens of each of the documents ``first`` to ``last``."""

    def text_hashes(self, first: int, last: int) -> NDArray[np.uint64]:
        """Hash of the raw text of each of the documents ``first`` to ``last``."""

    def outlines(self, first: int, last: int) -> NDArray[np.uint32]:
        """[n, 2]: `first_target` and `chosen_length` of each (see `Targets`); 0 where every token is a target."""


class Files(NamedTuple):
    """The input files of a corpus, F of them, in its order."""

    sources: Sequence[int]
    """[F]"""
    names: Sequence[str]
    """[F]; as the dataset calls them."""
    first_unit: NDArray[np.int64]
    """[F + 1]; of each file, then the number of units."""
    first_record: NDArray[np.int64]
    """[F + 1]; provenance number of each file's record 0, then the number of records (lines, rows)."""


_NO_FILES = Files((), (), np.zeros(1, np.int64), np.zeros(1, np.int64))


@dataclass(frozen=True, eq=False)
class Corpus:
    """All units; U of them."""

    folders: tuple[str, ...]
    """Below which units lie (see `unit_folder`): of the cache, and of another where that has some."""
    units: NDArray[np.void]
    """[U] of `UNIT`."""
    document_borders: NDArray[np.int64]
    """[U + 1] first document of each unit, then the number of documents."""
    token_borders: NDArray[np.int64]
    """[U + 1] first token address of each unit, then the number of tokens."""
    num_sources: int
    has_targets: bool
    """As in `UnitMeta`; alike in all units."""
    files: Files = _NO_FILES
    """Not saved."""
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, len(COUNTED)), np.int64))
    """[sources, counts] sums over the units of what `COUNTED` names. Not saved."""
    engines: Counter[str] = field(default_factory=Counter)
    """Units by `UnitMeta.engine`. Not saved."""

    @property
    def num_documents(self) -> int:
        """Documents of all sources."""
        return int(self.document_borders[-1])

    @cached_property
    def source_borders(self) -> NDArray[np.int64]:
        """[sources + 1] first document of each source, then the number of documents."""
        first_unit = np.searchsorted(self.units["source"], np.arange(self.num_sources + 1))
        return np.asarray(self.document_borders[first_unit])

    def lengths(self, first: int, last: int) -> NDArray[np.int64]:
        """Read the tokens of each of the documents ``first`` to ``last``: [last - first]."""
        return self._read("lengths", first, last).astype(np.int64)

    def text_hashes(self, first: int, last: int) -> NDArray[np.uint64]:
        """Read the hash of the raw text of each of the documents ``first`` to ``last``: [last - first]."""
        return self._read("text_hash", first, last)

    def outlines(self, first: int, last: int) -> NDArray[np.uint32]:
        """Read `first_target` and `chosen_length` of the documents: [last - first, 2]; no memory where all are 0."""
        if not self.has_targets:
            return np.broadcast_to(np.uint32(0), (last - first, 2))
        return np.stack([self._read(column, first, last) for column in ("first_target", "chosen_length")], axis=1)

    def _read(self, column: str, first: int, last: int) -> NDArray[Any]:
        out, done = None, 0
        unit = int(np.searchsorted(self.document_borders, first, "right")) - 1
        while first < last:
            start, past = self.document_borders[unit : unit + 2].tolist()
            end = min(last, past)
            part = read_column(self.directory(unit), column, first - start, end - first)
            out = np.empty(last - first, part.dtype) if out is None else out  # not a list of so many parts
            out[done : done + len(part)] = part
            first, done, unit = end, done + len(part), unit + 1
        assert out is not None, "of no documents"
        return out

    def place(self, document: int) -> str:
        """Return where a document comes from: file and line (or row), from 1 as editors count."""
        unit = int(np.searchsorted(self.document_borders, document, "right")) - 1
        record = int(self.open_unit(unit).records[document - self.document_borders[unit]])
        return f"{self.files.names[self.file(unit)]}:{self.record_in_file(unit) + record + 1}"

    def file(self, unit: int) -> int:
        """Return the index of a unit's file."""
        return int(np.searchsorted(self.files.first_unit, unit, "right")) - 1

    def record_in_file(self, unit: int) -> int:
        """Return how many records (lines, rows) of its file lie before a unit."""
        return int(self.units["first_record"][unit] - self.files.first_record[self.file(unit)])

    def directory(self, unit: int) -> Path:
        """Return the folder of a unit."""
        entry = self.units[unit]
        return unit_folder(Path(self.folders[entry["folder"]]), entry["key"].tobytes().hex())

    def open_unit(self, unit: int) -> StoreUnit:
        """Map one unit's files; a bounded number stays open."""
        return _open(self.directory(unit), int(self.units["content"][unit]))


class Counting:
    """Columns of a corpus that grow together: units are added in any order, and only sums are kept of most counts."""

    def __init__(self, units: NDArray[np.void], num_sources: int) -> None:
        """``units`` have all that is known before they are opened, and get the rest."""
        self.units = units
        self.is_added = np.zeros(len(units), np.bool_)
        self.counts = np.zeros((num_sources, len(COUNTED)), np.int64)
        self._borders = np.zeros((2, len(units) + 1), np.int64)
        self._engines: Counter[str] = Counter()
        self._has_targets = False

    def add(self, unit: int, meta: UnitMeta) -> None:
        """Take in what a unit holds; each is added once."""
        entry = self.units[unit]
        entry["content"], entry["bad"] = int(meta.content, 16), meta.quarantined > 0
        entry["first_record"] = meta.lines  # a sum in the end
        self._borders[:, unit + 1] = meta.documents, meta.tokens
        self.counts[entry["source"]] += [getattr(meta, name) for name in COUNTED]
        self._engines[meta.engine] += 1
        self._has_targets = meta.has_targets
        self.is_added[unit] = True

    def of_source(self, source: int, name: str) -> int:
        """Return one of `COUNTED`, of the units of a source that were added."""
        return int(self.counts[source, COUNTED.index(name)])

    def corpus(
        self, folders: Sequence[Path], sources: Sequence[int], names: Sequence[str], first_unit: NDArray[np.int64]
    ) -> Corpus:
        """Return the corpus when all units were added; the last call. Of its files see `Files`."""
        assert self.is_added.all(), "a unit was not counted"
        np.cumsum(self._borders, axis=1, out=self._borders)
        records, ends = self.units["first_record"], np.cumsum(self.units["first_record"])
        first_record = np.concatenate([[0], ends])[first_unit]
        records[...] = ends - records
        return Corpus(
            folders=tuple(str(folder.absolute()) for folder in folders),
            units=self.units,
            document_borders=self._borders[0],
            token_borders=self._borders[1],
            num_sources=len(self.counts),
            has_targets=self._has_targets,
            files=Files(sources, names, first_unit, first_record),
            counts=self.counts,
            engines=self._engines,
        )


@lru_cache(maxsize=32)  # each of up to four maps costs a file descriptor, of which a process may have only 256
def _open(directory: Path, content: int) -> StoreUnit:
    unit = open_unit(directory)
    if int(unit.meta.content, 16) != content:
        raise DataError(
            f"{directory}: another run made this unit again, with other content; run the same command again"
        )
    return unit


def close_units() -> None:
    """Forget opened units: one that was damaged is made again under the same name."""
    _open.cache_clear()


def read_corpus(folder: Path, files: Sequence[tuple[int, str]], units: Sequence[tuple[int, str]]) -> Corpus:
    """Open units and return the corpus that they are.

    Args:
        folder: below which they lie (see `unit_folder`).
        files: source and name of each file, in order.
        units: file and key of each unit, in order.
    """
    columns = np.zeros(len(units), UNIT)
    first_unit = np.searchsorted([file for file, _ in units], np.arange(len(files) + 1))
    sources, names = zip(*files, strict=True)
    counting = Counting(columns, max(sources) + 1)
    for number, (file, key) in enumerate(units):
        columns["key"][number], columns["source"][number] = np.void(bytes.fromhex(key)), sources[file]
        counting.add(number, open_unit(unit_folder(folder, key)).meta)
    return counting.corpus([folder], sources, names, first_unit)


def saved_in(staging: Path) -> Path:
    """Return the folder of the corpus in a staging directory."""
    return staging / "corpus"


def is_saved(corpus: Corpus, folder: Path) -> bool:
    """Whether `save` wrote the same corpus there, and it is still whole."""
    if not (folder / _NOTE).exists():
        return False
    columns = _columns(corpus)
    is_whole = all(
        (folder / name).exists() and (folder / name).stat().st_size == columns[name].nbytes for name in columns
    )
    return is_whole and (folder / _NOTE).read_text() == _note(corpus) == _note(load(folder))


def save(corpus: Corpus, folder: Path) -> None:
    """Write what shard tasks in other processes need to find tokens and provenance; the note makes it whole."""
    for name, column in _columns(corpus).items():
        with durable.writing(folder / name) as file:
            file.write(column.data)
    durable.write(folder / _NOTE, _note(corpus))


def load(folder: Path) -> Corpus:
    """Map a saved corpus; once in each process."""
    return _load(folder, (folder / _NOTE).stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _load(folder: Path, version: int) -> Corpus:
    del version  # another corpus may come under the same name
    note = json.loads((folder / _NOTE).read_text())
    return Corpus(
        folders=tuple(note["folders"]),
        units=np.memmap(folder / _UNITS, UNIT, "r"),
        document_borders=np.memmap(folder / _DOCUMENTS, "<i8", "r"),
        token_borders=np.memmap(folder / _TOKENS, "<i8", "r"),
        num_sources=note["num_sources"],
        has_targets=note["has_targets"],
    )


def _note(corpus: Corpus) -> str:
    hashes = {name: xxhash.xxh3_128_hexdigest(column.data) for name, column in _columns(corpus).items()}
    note = {"folders": corpus.folders, "num_sources": corpus.num_sources, "has_targets": corpus.has_targets}
    return json.dumps(note | {"xxh3_128": hashes})


def _columns(corpus: Corpus) -> dict[str, NDArray[Any]]:
    borders = {_DOCUMENTS: corpus.document_borders, _TOKENS: corpus.token_borders}
    return {_UNITS: corpus.units.view(np.uint8)} | {name: column.view(np.uint8) for name, column in borders.items()}
