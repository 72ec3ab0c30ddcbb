"""From the plan to the files of a dataset: one task gathers one shard; a last pass joins what the tasks counted.

Shard i is chunk i of `tokens`, followed by a side-car in the journal with its part of the other arrays and the hash
of the chunk. The side-car is written last and so is the record that the shard is done. No two tasks write one file.

A shard is made block by block, and memory is bounded by the block: it depends neither on the size of a shard nor on
how many segments it has.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep import arrays, mapped
from llmt_prep import corpus as corpora
from llmt_prep.gather import Origin, Segments, gather, kernels_for
from llmt_prep.rows import RowPlan, load_rows
from llmt_shared import durable, order
from llmt_shared.segments import count_targets

GROUP = 64
"""Rows are permuted inside groups of this many shards, so that a shard reads only its group's part of the input."""

GROUP_ROWS = 1 << 22
"""A group has fewer shards where they would hold more rows than this, so that its part of the plan stays small too."""

BLOCK_BYTES = 32 << 20
BLOCK_ROWS = BLOCK_SEGMENTS = 1 << 18
"""What a block of a shard holds at most, or one row where that is more."""

_DIGEST_BYTES = 32


@dataclass(frozen=True)
class SplitTask:
    """What the shards of one split share; picklable and small."""

    staging: str
    split: str
    num_sources: int
    length: int
    rows_per_shard: int
    dtype: str
    seed: int

    @property
    def plan_directory(self) -> Path:
        """Where `rows` wrote the plan."""
        return Path(self.staging) / "rows" / self.split

    @property
    def data_directory(self) -> Path:
        """Where the split's arrays grow."""
        return Path(self.staging) / "data" / self.split

    @property
    def rows_per_group(self) -> int:
        """Rows that are permuted together: whole shards."""
        return self.rows_per_shard * max(1, min(GROUP, GROUP_ROWS // self.rows_per_shard))

    def chunk(self, shard: int) -> Path:
        """The shard's tokens."""
        return self.data_directory / "tokens" / "c" / str(shard) / "0"

    def sidecar(self, shard: int) -> Path:
        """Where a shard's part of the small arrays waits for the last pass."""
        return Path(self.staging) / "journal" / f"{self.split}-{shard:06d}.sidecar"


class Sidecar(NamedTuple):
    """A block's part of the arrays beside `tokens`, in the order of its rows: R rows, S segments."""

    per_row: NDArray[np.int64]
    row_targets: NDArray[np.uint32]
    segment_length: NDArray[np.uint32]
    segment_offset: NDArray[np.uint32]
    segment_document: NDArray[np.uint64]
    segment_source: NDArray[np.uint16]


_BY_ROW = {"per_row": "<i8", "row_targets": "<u4"}
_BY_SEGMENT = {"segment_length": "<u4", "segment_offset": "<u4", "segment_document": "<u8", "segment_source": "<u2"}


class Totals(NamedTuple):
    """What the finished arrays hold."""

    rows: int
    segments: int
    tokens: int
    targets: int
    tokens_of_source: list[int]
    sha256: dict[Path, str]
    """Of every chunk file, hashed as it was written."""


def rows_per_shard(num_rows: int, length: int, itemsize: int, shard_bytes: int) -> int:
    """Rows of a shard so that shards are nearly equal: the last chunk is padded to full size on disk."""
    num_shards = max(1, round(num_rows * length * itemsize / shard_bytes))
    return max(1, -(-num_rows // num_shards))


def num_shards(num_rows: int, per_shard: int) -> int:
    """Chunk files of `tokens`."""
    return -(-num_rows // per_shard)


def is_written(task: SplitTask, shard: int) -> bool:
    """Whether a shard is done."""
    return task.sidecar(shard).exists() and task.chunk(shard).exists()


def write_shard(task: SplitTask, shard: int) -> None:
    """Gather one shard: its tokens, then its side-car."""
    plan = load_rows(task.plan_directory)
    corpus = corpora.load(Path(task.staging) / "corpus.json", task.num_sources)
    kernels = kernels_for(len(plan.length))
    buffer = _buffer(_rows_per_block(task), task.length, task.dtype)
    size = task.rows_per_shard * task.length * buffer.itemsize
    with durable.writing(task.sidecar(shard)) as sidecar:
        sidecar.write(bytes(_DIGEST_BYTES))  # known when all is written
        with arrays.writing_chunk(task.chunk(shard), size) as chunk:
            for segments in _blocks(task, shard, plan):
                rows = buffer[: len(segments.per_row)]
                origin = gather(rows, segments, corpus, kernels)
                chunk.add(rows)
                _write_block(sidecar, _sidecar(segments, origin))
        sidecar.seek(0)
        sidecar.write(bytes.fromhex(chunk.sha256()))


def finish_split(task: SplitTask) -> Totals:
    """Join the side-cars into the split's arrays; safe to repeat."""
    plan = load_rows(task.plan_directory)
    shape = (plan.num_rows, task.length)
    arrays.write_group(task.data_directory, {})
    arrays.write_metadata(
        task.data_directory / "tokens", shape, (task.rows_per_shard, task.length), np.dtype(task.dtype)
    )
    columns = _columns(task, plan.num_rows, len(plan.length))
    sha256: dict[Path, str] = {}
    num_segments = targets = 0
    tokens = np.zeros(task.num_sources, np.int64)
    columns["row_offsets"].add(np.zeros(1, np.int64))
    for block in _sidecars(task, num_shards(plan.num_rows, task.rows_per_shard), sha256):
        for name in columns.keys() - {"row_offsets"}:
            columns[name].add(getattr(block, name))
        columns["row_offsets"].add(num_segments + np.cumsum(block.per_row))
        num_segments += len(block.segment_length)
        targets += int(block.row_targets.sum())
        tokens += np.bincount(block.segment_source, block.segment_length, task.num_sources).astype(np.int64)
    for column in columns.values():
        column.finish()
        sha256 |= column.sha256
    return Totals(plan.num_rows, num_segments, int(tokens.sum()), targets, tokens.tolist(), sha256)


def _rows_per_block(task: SplitTask) -> int:
    row_bytes = task.length * np.dtype(task.dtype).itemsize
    return max(1, min(BLOCK_BYTES // row_bytes, BLOCK_ROWS, task.rows_per_shard))


@lru_cache(maxsize=1)
def _buffer(num_rows: int, length: int, dtype: str) -> NDArray[Any]:
    """Rows to gather into, used again for every block: fresh memory costs ten times as much to write."""
    return np.empty((num_rows, length), dtype)


def _blocks(task: SplitTask, shard: int, plan: RowPlan) -> Iterator[Segments]:
    """The shard's segments, in blocks of whole rows."""
    row, stop = shard * task.rows_per_shard, min((shard + 1) * task.rows_per_shard, plan.num_rows)
    while row < stop:
        rows = _planned_rows(task, row, min(_rows_per_block(task), stop - row), plan.num_rows)
        starts = mapped.take(plan.offsets, rows)
        per_row = mapped.take(plan.offsets, rows + 1) - starts
        fitting = max(1, int(np.searchsorted(np.cumsum(per_row), BLOCK_SEGMENTS, "right")))
        yield _segments(plan, starts[:fitting], per_row[:fitting])
        row += len(per_row[:fitting])


def _planned_rows(task: SplitTask, first: int, count: int, num_rows: int) -> NDArray[np.int64]:
    """Numbers, in the plan, of some rows of a group: [count]."""
    group, place = divmod(first, task.rows_per_group)
    start = group * task.rows_per_group
    size = min(num_rows - start, task.rows_per_group)
    return start + order.rows(order.key(task.seed, *task.split.encode()), group, place, count, size)


def _segments(plan: RowPlan, starts: NDArray[np.int64], per_row: NDArray[np.int64]) -> Segments:
    first = np.cumsum(per_row) - per_row
    index = np.arange(per_row.sum()) + np.repeat(starts - first, per_row)
    columns = (mapped.take(column, index) for column in (plan.length, plan.offset, plan.document, plan.address))
    return Segments(per_row, *columns)


def _sidecar(segments: Segments, origin: Origin) -> Sidecar:
    row = np.repeat(np.arange(len(segments.per_row)), segments.per_row)
    targets = np.bincount(row, count_targets(segments.length), len(segments.per_row))
    return Sidecar(
        per_row=segments.per_row,
        row_targets=targets.astype(np.uint32),
        segment_length=segments.length,
        segment_offset=segments.offset,
        segment_document=origin.document,
        segment_source=origin.source,
    )


def _write_block(file: BinaryIO, block: Sidecar) -> None:
    """Append the numbers of rows and segments, then each array; not `np.save`, whose errors hide a full disk."""
    file.write(np.array([len(block.per_row), len(block.segment_length)], "<i8").data)
    for name, dtype in (_BY_ROW | _BY_SEGMENT).items():
        file.write(np.ascontiguousarray(getattr(block, name), dtype).data)


def _read_blocks(file: BinaryIO) -> Iterator[Sidecar]:
    while header := file.read(16):
        rows, segments = np.frombuffer(header, "<i8").tolist()
        counts = dict.fromkeys(_BY_ROW, rows) | dict.fromkeys(_BY_SEGMENT, segments)
        columns = {name: np.dtype(dtype) for name, dtype in (_BY_ROW | _BY_SEGMENT).items()}
        yield Sidecar(
            **{name: np.frombuffer(file.read(counts[name] * dtype.itemsize), dtype) for name, dtype in columns.items()}
        )


def _sidecars(task: SplitTask, count: int, sha256: dict[Path, str]) -> Iterator[Sidecar]:
    """All blocks of all shards in order; ``sha256`` gets the hash of each shard's chunk."""
    for shard in range(count):
        with task.sidecar(shard).open("rb") as file:
            sha256[task.chunk(shard)] = file.read(_DIGEST_BYTES).hex()
            yield from _read_blocks(file)


def _columns(task: SplitTask, num_rows: int, num_segments: int) -> dict[str, arrays.ColumnWriter]:
    lengths = {name: (num_segments, dtype) for name, dtype in _BY_SEGMENT.items()}
    lengths |= {"row_targets": (num_rows, "<u4"), "row_offsets": (num_rows + 1, "<i8")}
    return {
        name: arrays.ColumnWriter(task.data_directory / name, length, np.dtype(dtype).name)
        for name, (length, dtype) in lengths.items()
    }
