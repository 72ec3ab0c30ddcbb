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
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep.corpus import Corpus
from llmt_prep.order import Documents
from llmt_prep.packing import Overflow, PackedRows, pack_windows, split_documents
from llmt_prep.tally import Counter, Tally, counting
from llmt_shared import durable

_COLUMNS = {"offset": "<u4", "length": "<u4", "document": "<i8", "address": "<i8"}


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


class Segments(NamedTuple):
    """Parts of documents that fit a row, as they are packed; columns as in `RowPlan`, but a pair is one item."""

    offset: NDArray[np.uint32]
    length: NDArray[np.int32]
    document: NDArray[np.int64]
    address: NDArray[np.int64]
    chosen: NDArray[np.int32]
    """Of a pair, how many of its tokens are of the chosen side; else 0."""


def write_rows(
    directory: Path,
    windows: Iterator[Documents],
    corpus: Corpus,
    capacity: int,
    overflow: Overflow,
    carry: float,
) -> None:
    """Pack windows of corpus documents and write the plan; ``plan.json`` is written last and makes it whole.

    Raises:
        DataError: ``overflow`` is ``error`` and a document is longer than a row.
    """
    with ExitStack() as stack:
        counter = stack.enter_context(counting(directory / "seen", corpus))
        files = {
            name: stack.enter_context(durable.writing(directory / f"{name}.bin")) for name in ("offsets", *_COLUMNS)
        }
        files["offsets"].write(np.zeros(1, "<i8").data)
        end = 0
        segments = (_cut(window, capacity, overflow, counter) for window in windows)
        for rows in pack_windows(segments, capacity, carry):
            end = _append(files, _sides(rows), end)
        tallies = counter.totals()
    durable.write(directory / "plan.json", json.dumps([asdict(each) for each in tallies]))


def is_planned(directory: Path) -> bool:
    """Whether the plan in a directory is whole."""
    return (directory / "plan.json").exists()


def plan_bytes(num_rows: int, num_segments: int) -> int:
    """Return the bytes of a plan's columns."""
    return 8 * (num_rows + 1) + num_segments * sum(np.dtype(dtype).itemsize for dtype in _COLUMNS.values())


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


def _cut(window: Documents, capacity: int, overflow: Overflow, counter: Counter) -> Segments:
    first_target, chosen_length = window.outline.T
    pieces = split_documents(window.length, capacity, overflow, first_target)
    counter.add(window, pieces)
    chosen = chosen_length[pieces.document].astype(np.int32)
    missing = window.length[pieces.document] - pieces.length
    from_each = np.where(chosen > 0, missing // 2, 0)  # of a pair that is too long, tokens of both prompts
    offset = pieces.offset + from_each
    return Segments(
        offset=offset.astype(np.uint32),
        length=pieces.length,
        document=window.document[pieces.document],
        address=window.address[pieces.document] + offset,
        chosen=(chosen - from_each).astype(np.int32),
    )


def _sides(rows: PackedRows[Segments]) -> PackedRows[Segments]:
    """Make two segments of every pair, its chosen side and then its rejected one."""
    items = rows.items
    if not items.chosen.any():
        return rows
    both = Segments._make(np.repeat(column, 2) for column in items)
    both.length[0::2], both.length[1::2] = items.chosen, items.length - items.chosen
    both.offset[1::2] += (items.chosen + items.offset).astype(np.uint32)  # as much is cut from the one as the other
    both.address[1::2] += items.chosen + items.offset
    return PackedRows(2 * rows.offsets, both)


def _append(files: dict[str, BinaryIO], rows: PackedRows[Segments], end: int) -> int:
    for name, dtype in _COLUMNS.items():
        files[name].write(np.ascontiguousarray(getattr(rows.items, name), dtype).data)
    files["offsets"].write(np.ascontiguousarray(rows.offsets[1:] + end, "<i8").data)
    return end + int(rows.offsets[-1])
