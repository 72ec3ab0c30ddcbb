"""From the plan to the files of a dataset: one task gathers one shard; a last pass joins what the tasks counted.

Shard i is chunk i of `tokens`, followed by a side-car in the journal with its part of the other arrays and the hash
of the chunk. The side-car is written last and so is the record that the shard is done. No two tasks write one file.

A shard is made block by block, and memory is bounded by the block: it depends neither on the size of a shard nor on
how many segments it has.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep import arrays, mapped, staging
from llmt_prep import corpus as corpora
from llmt_prep.corpus import Corpus
from llmt_prep.gather import Origin, Segments, gather, kernels_for
from llmt_prep.rows import RowPlan, load_rows
from llmt_prep.spans import spans_of_rows
from llmt_shared import durable, order
from llmt_shared.chunks import CRC_BYTES
from llmt_shared.errors import DataError
from llmt_shared.objects import ObjectPath
from llmt_shared.segments import count_targets

if TYPE_CHECKING:
    from llmt_prep.config import Kind

GROUP = 64
"""Rows are permuted inside groups of this many shards, so that a shard reads only its group's part of the input."""

GROUP_ROWS = 1 << 22
"""A group has fewer shards where they would hold more rows than this, so that its part of the plan stays small too."""

BLOCK_BYTES = 32 << 20
BLOCK_ROWS = BLOCK_SEGMENTS = 1 << 18
"""What a block of a shard holds at most, or one row where that is more."""

_DIGEST_BYTES = 32
_COUNTS_BYTES = 24


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
    kind: "Kind"
    recipe: str
    """What the staging directory is made for. A task that was taken for lost may go on when another run has the
    directory."""
    store: ObjectPath | None = None
    """URL of the dataset, to which a chunk goes as soon as it is made; ``None``: it stays."""

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

    @property
    def chunk_bytes(self) -> int:
        """Size of each chunk file."""
        return self.rows_per_shard * self.length * np.dtype(self.dtype).itemsize + CRC_BYTES

    def uploaded(self, shard: int) -> ObjectPath:
        """Where the shard's tokens go, if they do."""
        assert self.store is not None, "of a dataset below a URL"
        return self.store / self.split / "tokens" / "c" / str(shard) / "0"

    def sidecar(self, shard: int) -> Path:
        """Where a shard's part of the small arrays waits for the last pass."""
        return Path(self.staging) / "journal" / f"{self.split}-{shard:06d}.sidecar"


Part = dict[str, NDArray[Any]]
"""A block's part of the arrays beside `tokens`, by name, in the order of its rows."""

_BY_ROW = {"segments_per_row": "<i8", "row_targets": "<u4"}
_BY_SEGMENT = {"segment_length": "<u4", "segment_offset": "<u4", "segment_document": "<u8", "segment_source": "<u2"}
_BY_SPAN = {"span_start": "<u4", "span_length": "<u4"}
_LAYOUTS: dict[str, tuple[dict[str, str], ...]] = {
    "pretrain": (_BY_ROW, _BY_SEGMENT, {}),
    "sft": (_BY_ROW | {"spans_per_row": "<i8"}, _BY_SEGMENT, _BY_SPAN),
    "preference": (_BY_ROW | {"spans_per_row": "<i8", "row_chosen_targets": "<u4"}, _BY_SEGMENT, _BY_SPAN),
}
"""What a side-car holds for each row, each segment and each span."""
_OFFSETS = {"segments_per_row": "row_offsets", "spans_per_row": "span_offsets"}
"""Counts of the side-cars that the dataset has as running sums."""


class Totals(NamedTuple):
    """What the finished arrays hold."""

    rows: int
    segments: int
    tokens: int
    targets: int
    spans: int
    pairs: int
    tokens_of_source: list[int]
    sha256: dict[Path, str]
    """Of every chunk file, hashed as it was written."""
    uploaded: dict[Path, int]
    """Sizes of the chunk files that are not here any more."""


def rows_per_shard(num_rows: int, length: int, itemsize: int, shard_bytes: int) -> int:
    """Rows of a shard so that shards are nearly equal: the last chunk is padded to full size on disk."""
    num_shards = max(1, round(num_rows * length * itemsize / shard_bytes))
    return max(1, -(-num_rows // num_shards))


def num_shards(num_rows: int, per_shard: int) -> int:
    """Chunk files of `tokens`."""
    return -(-num_rows // per_shard)


def is_written(task: SplitTask, shard: int) -> bool:
    """Whether a shard is done, as far as this machine knows."""
    return task.sidecar(shard).exists() and (task.store is not None or task.chunk(shard).exists())


def unwritten(task: SplitTask, count: int) -> list[int]:
    """Return which of the first ``count`` shards are not done; a store is asked for what it has."""
    if task.store is None:
        return [shard for shard in range(count) if not is_written(task, shard)]
    sizes = {each.path: each.stat.st_size for each in (task.store / task.split / "tokens" / "c").files()}
    is_there = [sizes.get(task.uploaded(shard)) == task.chunk_bytes for shard in range(count)]
    return [shard for shard in range(count) if not (is_there[shard] and is_written(task, shard))]


def write_shard(task: SplitTask, shard: int, num_segments: int | None = None) -> None:
    """Gather one shard: its tokens, which may go to a store at once, then its side-car.

    Args:
        task: what the split's shards share.
        shard: its number.
        num_segments: of the plan that the loops are chosen for; by default this one.

    Raises:
        DataError: nobody works on the task's recipe there any more.
    """
    if not staging.is_of(Path(task.staging), task.recipe):
        raise DataError(f"{task.staging}: is not of this run any more; run the same command again")
    plan = load_rows(task.plan_directory)
    corpus = corpora.load(corpora.saved_in(Path(task.staging)))
    kernels = kernels_for(len(plan.length) if num_segments is None else num_segments)
    buffer = _buffer(_rows_per_block(task), task.length, task.dtype)
    with durable.writing(task.sidecar(shard)) as sidecar:
        sidecar.write(bytes(_DIGEST_BYTES + _COUNTS_BYTES))  # known when all is written
        counts = np.zeros(3, "<i8")
        with arrays.writing_chunk(task.chunk(shard), task.chunk_bytes - CRC_BYTES) as chunk:
            for segments in _blocks(task, shard, plan):
                rows = buffer[: len(segments.per_row)]
                origin = gather(rows, segments, corpus, kernels)
                chunk.add(rows)
                counts += _write_block(sidecar, _LAYOUTS[task.kind], _part(task, segments, origin, corpus))
        if task.store is not None:
            _move(task.chunk(shard), task.uploaded(shard))
        sidecar.seek(0)
        sidecar.write(bytes.fromhex(chunk.sha256()))
        sidecar.write(counts.data)


def _move(chunk: Path, url: ObjectPath) -> None:
    """Upload a chunk and remove it here, for the disk need not hold all of them."""
    from llmt_prep.uploading import upload

    try:
        upload(chunk, url)
        chunk.unlink()
    except FileNotFoundError:
        if chunk.exists():
            raise
        return  # another attempt at the same shard, which was taken for lost, has done it
    with suppress(OSError):  # such an attempt may write there
        chunk.parent.rmdir()


def finish_split(task: SplitTask) -> Totals:
    """Join the side-cars into the split's arrays; safe to repeat."""
    plan = load_rows(task.plan_directory)
    shape = (plan.num_rows, task.length)
    arrays.write_group(task.data_directory, {})
    arrays.write_metadata(
        task.data_directory / "tokens", shape, (task.rows_per_shard, task.length), np.dtype(task.dtype)
    )
    counts = _counts(task, num_shards(plan.num_rows, task.rows_per_shard))
    columns = _columns(task, counts)
    ends = dict.fromkeys(_OFFSETS.values() & columns.keys(), 0)
    for name in ends:
        columns[name].add(np.zeros(1, np.int64))
    targets, tokens = 0, np.zeros(task.num_sources, np.int64)
    sha256: dict[Path, str] = {}
    for part in _sidecars(task, num_shards(plan.num_rows, task.rows_per_shard), sha256):
        for name, values in part.items():
            if name in _OFFSETS:
                offsets = ends[_OFFSETS[name]] + np.cumsum(values)
                ends[_OFFSETS[name]] = int(offsets[-1])
                columns[_OFFSETS[name]].add(offsets)
            else:
                columns[name].add(values)
        targets += int(part["row_targets"].sum(dtype=np.int64))
        tokens += np.bincount(part["segment_source"], part["segment_length"], task.num_sources).astype(np.int64)
        if task.kind == "preference":
            _add_pairs(columns, part["segments_per_row"], ends["row_offsets"])
    for column in columns.values():
        column.finish()
        sha256 |= column.sha256
    _, segments, spans = counts.tolist()
    pairs = segments // 2 if task.kind == "preference" else 0
    chunks = range(num_shards(plan.num_rows, task.rows_per_shard)) if task.store else ()
    uploaded = {task.chunk(shard): task.chunk_bytes for shard in chunks}
    return Totals(plan.num_rows, segments, int(tokens.sum()), targets, spans, pairs, tokens.tolist(), sha256, uploaded)


def column_sizes(kind: "Kind", rows: int, segments: int, spans: int) -> dict[str, tuple[int, str, int | None]]:
    """Return elements, dtype and columns (``None`` for one dimension) of a split's arrays beside `tokens`, by name."""
    counts = (rows, segments, spans)
    groups = zip(counts, _LAYOUTS[kind], strict=True)
    sizes: dict[str, tuple[int, str, int | None]] = {
        name: (count, np.dtype(dtype).name, None) for count, group in groups for name, dtype in group.items()
    }
    for name in _OFFSETS.keys() & sizes.keys():
        del sizes[name]
        sizes[_OFFSETS[name]] = (rows + 1, "int64", None)
    if kind == "preference":
        sizes |= {"pair_offsets": (rows + 1, "int64", None), "pair_segments": (segments // 2, "uint64", 2)}
    return sizes


def sidecar_bytes(kind: "Kind", rows: int, segments: int, spans: int) -> int:
    """Return the bytes of all side-cars together, without the few that each begins with."""
    groups = zip((rows, segments, spans), _LAYOUTS[kind], strict=True)
    return sum(count * np.dtype(dtype).itemsize for count, group in groups for dtype in group.values())


def _add_pairs(columns: dict[str, arrays.ColumnWriter], segments_per_row: NDArray[np.int64], end: int) -> None:
    """Of rows whose last segment is ``end`` - 1: two successive segments are a pair."""
    first = end - int(segments_per_row.sum())
    if first == 0:
        columns["pair_offsets"].add(np.zeros(1, np.int64))
    columns["pair_offsets"].add((first + np.cumsum(segments_per_row)) // 2)
    columns["pair_segments"].add(np.arange(first, end, dtype=np.uint64).reshape(-1, 2))


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


def _part(task: SplitTask, segments: Segments, origin: Origin, corpus: Corpus) -> Part:
    part: Part = {
        "segments_per_row": segments.per_row,
        "segment_length": segments.length,
        "segment_offset": segments.offset,
        "segment_document": origin.document,
        "segment_source": origin.source,
    }
    row, num_rows = np.repeat(np.arange(len(segments.per_row)), segments.per_row), len(segments.per_row)
    if task.kind == "pretrain":
        return part | {"row_targets": np.bincount(row, count_targets(segments.length), num_rows)}
    spans = spans_of_rows(segments, task.length, corpus)
    row = row[spans.segment]
    part |= {"spans_per_row": spans.per_row, "span_start": spans.start, "span_length": spans.length}
    part["row_targets"] = np.bincount(row, spans.length, num_rows)
    if task.kind == "preference":
        part["row_chosen_targets"] = np.bincount(row, spans.length * (spans.segment % 2 == 0), num_rows)
    return part


def _write_block(file: BinaryIO, layout: Sequence[Mapping[str, str]], part: Part) -> NDArray[np.int64]:
    """Append the numbers of rows, segments and spans, then each array; not `np.save`, whose errors hide a full disk."""
    counts = np.array([len(part[next(iter(group))]) if group else 0 for group in layout], "<i8")
    file.write(counts.data)
    for group in layout:
        for name, dtype in group.items():
            file.write(np.ascontiguousarray(part[name].astype(dtype, copy=False)).data)
    return counts


def _read_blocks(file: BinaryIO, layout: Sequence[Mapping[str, str]]) -> Iterator[Part]:
    while header := file.read(_COUNTS_BYTES):
        part: Part = {}
        for count, group in zip(np.frombuffer(header, "<i8").tolist(), layout, strict=True):
            for name, dtype in group.items():
                part[name] = np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype)
        yield part


def _counts(task: SplitTask, count: int) -> NDArray[np.int64]:
    """Rows, segments and spans of all shards."""
    counts = np.zeros(3, np.int64)
    for shard in range(count):
        with task.sidecar(shard).open("rb") as file:
            counts += np.frombuffer(file.read(_DIGEST_BYTES + _COUNTS_BYTES)[_DIGEST_BYTES:], "<i8")
    return counts


def _sidecars(task: SplitTask, count: int, sha256: dict[Path, str]) -> Iterator[Part]:
    """All blocks of all shards in order; ``sha256`` gets the hash of each shard's chunk."""
    for shard in range(count):
        with task.sidecar(shard).open("rb") as file:
            sha256[task.chunk(shard)] = file.read(_DIGEST_BYTES).hex()
            file.seek(_COUNTS_BYTES, os.SEEK_CUR)
            yield from _read_blocks(file, _LAYOUTS[task.kind])


def _columns(task: SplitTask, counts: NDArray[np.int64]) -> dict[str, arrays.ColumnWriter]:
    return {
        name: arrays.ColumnWriter(task.data_directory / name, size, dtype, width)
        for name, (size, dtype, width) in column_sizes(task.kind, *counts.tolist()).items()
    }
