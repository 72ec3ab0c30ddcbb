"""From the plan to the files of a dataset: one task gathers one shard; a last pass joins what the tasks counted.

Shard i is chunk i of `tokens`, followed by a side-car in the journal with its part of the other arrays. The side-car
is written last and so is the record that the shard is done. No two tasks write one file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep import arrays
from llmt_prep import corpus as corpora
from llmt_prep.corpus import Corpus
from llmt_prep.rows import RowPlan, load_rows
from llmt_shared import durable
from llmt_shared.order import key, shuffled
from llmt_shared.segments import count_targets

GROUP = 64
"""Rows are permuted inside groups of this many shards, so that a shard reads only its group's part of the input."""


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

    def sidecar(self, shard: int) -> Path:
        """Where a shard's part of the small arrays waits for the last pass."""
        return Path(self.staging) / "journal" / f"{self.split}-{shard:06d}.npz"


class Sidecar(NamedTuple):
    """A shard's part of the arrays beside `tokens`, in the order of its rows."""

    per_row: NDArray[np.int64]
    segment_length: NDArray[np.uint32]
    segment_offset: NDArray[np.uint32]
    segment_document: NDArray[np.uint64]
    segment_source: NDArray[np.uint16]
    row_targets: NDArray[np.uint32]


class Totals(NamedTuple):
    """What the finished arrays hold."""

    rows: int
    segments: int
    tokens: int
    targets: int
    tokens_of_source: list[int]


def rows_per_shard(num_rows: int, length: int, itemsize: int, shard_bytes: int) -> int:
    """Rows of a shard so that shards are nearly equal: the last chunk is padded to full size on disk."""
    num_shards = max(1, round(num_rows * length * itemsize / shard_bytes))
    return max(1, -(-num_rows // num_shards))


def num_shards(num_rows: int, per_shard: int) -> int:
    """Chunk files of `tokens`."""
    return -(-num_rows // per_shard)


def write_shard(task: SplitTask, shard: int) -> None:
    """Gather one shard: its tokens, then its side-car."""
    plan = load_rows(task.plan_directory)
    corpus = corpora.load(Path(task.staging) / "corpus.json", task.num_sources)
    rows = _rows_of_shard(task, shard, plan.num_rows)
    per_row = plan.offsets[rows + 1] - plan.offsets[rows]
    segments = _ranges(plan.offsets[rows], per_row)
    tokens = np.zeros((task.rows_per_shard, task.length), task.dtype)
    _gather(tokens, plan, segments, per_row, corpus)
    arrays.write_chunk(task.data_directory / "tokens" / "c" / str(shard) / "0", tokens)
    sidecar = _sidecar(plan, segments, per_row, corpus)
    with durable.writing(task.sidecar(shard)) as file:
        np.savez(file, **sidecar._asdict())


def finish_split(task: SplitTask) -> Totals:
    """Join the side-cars into the split's arrays; safe to repeat."""
    plan = load_rows(task.plan_directory)
    n, directory = plan.num_rows, task.data_directory
    arrays.write_group(directory, {})
    arrays.write_metadata(
        directory / "tokens", (n, task.length), (task.rows_per_shard, task.length), np.dtype(task.dtype)
    )
    num_segments = len(plan.length)
    for name, dtype, length in (
        ("segment_length", "uint32", num_segments),
        ("segment_offset", "uint32", num_segments),
        ("segment_document", "uint64", num_segments),
        ("segment_source", "uint16", num_segments),
        ("row_targets", "uint32", n),
    ):
        arrays.write_column(directory / name, _parts(task, name), length, dtype)
    arrays.write_column(directory / "row_offsets", _row_offsets(task), n + 1, "int64")
    return _totals(task, n, num_segments)


def _rows_of_shard(task: SplitTask, shard: int, num_rows: int) -> NDArray[np.int64]:
    """Numbers, in the plan, of a shard's rows."""
    group, first_shard = shard // GROUP, shard - shard % GROUP
    group_start = first_shard * task.rows_per_shard
    group_size = min(num_rows - group_start, GROUP * task.rows_per_shard)
    permutation = _permutation(group_size, key(task.seed, *task.split.encode()), group)
    start = (shard - first_shard) * task.rows_per_shard
    rows: NDArray[np.int64] = group_start + permutation[start : start + task.rows_per_shard]
    return rows


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, group: int) -> NDArray[np.int64]:
    return shuffled(size, seed, group)


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """``starts[i], starts[i] + 1, .. (counts[i] of them)`` for every i, one after another."""
    first = np.cumsum(counts) - counts
    out: NDArray[np.int64] = np.arange(counts.sum()) + np.repeat(starts - first, counts)
    return out


def _gather(
    out: NDArray[np.integer], plan: RowPlan, segments: NDArray[np.int64], per_row: NDArray[np.int64], corpus: Corpus
) -> None:
    lengths, addresses = plan.length[segments].astype(np.int64), plan.address[segments]
    row = np.repeat(np.arange(len(per_row)), per_row)
    before = np.cumsum(lengths) - lengths  # tokens of the shard's segments before this one
    row_start = before[np.cumsum(per_row) - per_row]  # a planned row holds at least one segment
    place = row * out.shape[1] + before - row_start[row]
    unit = np.searchsorted(corpus.token_borders, addresses, "right") - 1
    source = addresses - corpus.token_borders[unit]
    flat = out.reshape(-1)
    order = np.argsort(addresses, kind="stable")  # units one after another, and forwards in each
    for u, a, p, n in zip(
        unit[order].tolist(), source[order].tolist(), place[order].tolist(), lengths[order].tolist(), strict=True
    ):
        flat[p : p + n] = corpus.open_unit(u).tokens[a : a + n]


def _sidecar(plan: RowPlan, segments: NDArray[np.int64], per_row: NDArray[np.int64], corpus: Corpus) -> Sidecar:
    lengths, documents = plan.length[segments], plan.document[segments]
    unit = np.searchsorted(corpus.document_borders, documents, "right") - 1
    number = np.empty(len(segments), np.uint64)
    for u in np.unique(unit):
        mine = unit == u
        records = corpus.open_unit(int(u)).records[documents[mine] - corpus.document_borders[u]]
        entry = corpus.units[int(u)]
        number[mine] = records.astype(np.uint64) + np.uint64(entry.file_document + entry.records_before)
    row = np.repeat(np.arange(len(per_row)), per_row)
    return Sidecar(
        per_row=per_row,
        segment_length=lengths,
        segment_offset=plan.offset[segments],
        segment_document=number,
        segment_source=np.array([each.source for each in corpus.units], np.uint16)[unit],
        row_targets=np.bincount(row, count_targets(lengths), len(per_row)).astype(np.uint32),
    )


def _parts(task: SplitTask, name: str) -> Iterator[NDArray[Any]]:
    """One array's part in every side-car, in the order of shards; nothing else of them is read."""
    for shard in range(num_shards(load_rows(task.plan_directory).num_rows, task.rows_per_shard)):
        with np.load(task.sidecar(shard), allow_pickle=False) as stored:
            yield stored[name]


def _row_offsets(task: SplitTask) -> Iterator[NDArray[np.int64]]:
    yield np.zeros(1, np.int64)
    end = 0
    for per_row in _parts(task, "per_row"):
        yield end + np.cumsum(per_row)
        end += int(per_row.sum())


def _totals(task: SplitTask, num_rows: int, num_segments: int) -> Totals:
    by_source = np.zeros(task.num_sources, np.int64)
    for source, length in zip(_parts(task, "segment_source"), _parts(task, "segment_length"), strict=True):
        by_source += np.bincount(source, length, task.num_sources).astype(np.int64)
    targets = sum(int(part.sum()) for part in _parts(task, "row_targets"))
    return Totals(num_rows, num_segments, int(by_source.sum()), targets, by_source.tolist())
