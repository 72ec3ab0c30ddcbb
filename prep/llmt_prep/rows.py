"""The plan of a split: which segments lie in which row. One pass over the windows writes it to files.

Shards are then a pure function of (plan, number of the shard), so they can be built in any process and order, and
again after a kill. Rows are in the order of packing here; `shards` permutes them.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llmt_prep.corpus import Corpus
from llmt_prep.packing import Overflow, PackedRows, Pieces, pack_windows, split_documents
from llmt_shared import durable

_COLUMNS = {"offset": "<u4", "length": "<u4", "document": "<i8", "address": "<i8"}


@dataclass(frozen=True)
class Tally:
    """What became of one source's documents in one split; tokens unless it says documents."""

    documents: int
    """Selected documents, each counted as often as it was selected."""
    tokens: int
    distinct_documents: int
    distinct_tokens: int
    truncated: int
    dropped_documents: int
    dropped: int


@dataclass(frozen=True)
class RowPlan:
    """Mapped files: row r owns segments ``offsets[r] : offsets[r + 1]``; columns are by segment."""

    offsets: NDArray[np.int64]
    offset: NDArray[np.uint32]
    """Where in its document a segment starts."""
    length: NDArray[np.uint32]
    document: NDArray[np.int64]
    """Index into the corpus."""
    address: NDArray[np.int64]
    """Of the segment's first token, in the corpus."""
    tallies: tuple[Tally, ...]
    """By source."""

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return len(self.offsets) - 1


def write_rows(
    directory: Path,
    windows: Iterator[NDArray[np.int64]],
    corpus: Corpus,
    capacity: int,
    overflow: Overflow,
    carry: float,
) -> None:
    """Pack windows of corpus documents and write the plan; ``plan.json`` is written last and makes it whole.

    Raises:
        DataError: ``overflow`` is ``error`` and a document is longer than a row.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tally = _Counter(corpus)
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(durable.writing(directory / f"{name}.bin")) for name in ("offsets", *_COLUMNS)
        }
        files["offsets"].write(np.zeros(1, "<i8").tobytes())
        end = 0
        pieces = (tally.split(window, capacity, overflow) for window in windows)
        for rows in pack_windows(pieces, capacity, carry):
            end = _append(files, rows, corpus, end)
    durable.write(directory / "plan.json", json.dumps([asdict(each) for each in tally.totals()]))


def is_planned(directory: Path) -> bool:
    """Whether the plan in a directory is whole."""
    return (directory / "plan.json").exists()


def load_rows(directory: Path) -> RowPlan:
    """Map a plan; once in each process."""
    return _load_rows(directory, (directory / "plan.json").stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _load_rows(directory: Path, version: int) -> RowPlan:
    del version  # another plan may come under the same name
    columns = {name: _map(directory / f"{name}.bin", dtype) for name, dtype in _COLUMNS.items()}
    tallies = tuple(Tally(**each) for each in json.loads((directory / "plan.json").read_text()))
    return RowPlan(_map(directory / "offsets.bin", "<i8"), **columns, tallies=tallies)


def _map(path: Path, dtype: str) -> NDArray:  # type: ignore[type-arg]
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _append(files: dict[str, BinaryIO], rows: PackedRows[Pieces], corpus: Corpus, end: int) -> int:
    segments = rows.items
    columns: dict[str, NDArray[Any]] = {
        "offset": segments.offset,
        "length": segments.length,
        "document": segments.document,
        "address": corpus.addresses[segments.document] + segments.offset,
    }
    for name, values in columns.items():
        files[name].write(values.astype(_COLUMNS[name]).tobytes())
    files["offsets"].write((rows.offsets[1:] + end).astype("<i8").tobytes())
    return end + int(rows.offsets[-1])


class _Counter:
    """Counts what passes through, independently of the mixture's own arithmetic: the ledger compares the two."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._seen = np.zeros(len(corpus.lengths), bool)
        self._sums = np.zeros((corpus.num_sources, 5), np.int64)

    def split(self, window: NDArray[np.int64], capacity: int, overflow: Overflow) -> Pieces:
        lengths = self._corpus.lengths[window]
        pieces = split_documents(lengths, capacity, overflow)
        kept = np.bincount(pieces.document, pieces.length, len(window)).astype(np.int64)
        self._seen[window] = True
        source = np.searchsorted(self._corpus.source_borders, window, "right") - 1
        gone = kept == 0
        for column, values in enumerate((1, lengths, (lengths - kept) * ~gone, gone, lengths * gone)):
            np.add.at(self._sums[:, column], source, values)
        return pieces._replace(document=window[pieces.document])

    def totals(self) -> list[Tally]:
        borders, lengths = self._corpus.source_borders, self._corpus.lengths
        out = []
        for (documents, tokens, truncated, dropped_documents, dropped), first, last in zip(
            self._sums.tolist(), borders, borders[1:], strict=False
        ):
            seen = self._seen[first:last]
            out.append(
                Tally(
                    documents=documents,
                    tokens=tokens,
                    distinct_documents=int(seen.sum()),
                    distinct_tokens=int(lengths[first:last][seen].sum()),
                    truncated=truncated,
                    dropped_documents=dropped_documents,
                    dropped=dropped,
                )
            )
        return out
