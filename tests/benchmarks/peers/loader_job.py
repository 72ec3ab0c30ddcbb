"""What every loader's script shares: its command line, and how rows become the tensors of a micro-batch.

usage: python loader_PEER.py write FLAT_FOLDER OUTPUT
       python loader_PEER.py check OUTPUT ROWS [WAY]         prints a sum of hashes of that many micro-batches
       python loader_PEER.py read OUTPUT MICRO_ROWS [WAY]    reads when it is told to

`read` opens, prints "ready", and answers each line "SECONDS MOST_ROWS" of its input with a line of JSON: what it read
until the time was over or the rows were used up.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

LENGTH = 4096
IGNORE = -100
WARM_UP = 64
"""Rows that are read before the first answer: threads have started, code and buffers are there."""


class MicroBatch(NamedTuple):
    """Rows laid end to end, N tokens; a row's padding is a piece of its own. What a model and its loss read."""

    input_ids: torch.Tensor
    """[1, N] int64."""
    labels: torch.Tensor
    """[1, N] int64; the next token of the same segment, else -100."""
    position_ids: torch.Tensor
    """[1, N] int64; from 0 in every piece."""
    cu_seqlens: torch.Tensor
    """[pieces + 1] int32."""
    max_seqlen: int


class Flat(NamedTuple):
    """All rows, as they lie on disk before any loader's own format."""

    tokens: np.ndarray
    """[rows, L] uint16, mapped."""
    row_offsets: np.ndarray
    """[rows + 1] int64; segments of a row."""
    segment_length: np.ndarray
    """[segments] uint16."""

    def lengths(self, row: int) -> np.ndarray:
        return self.segment_length[self.row_offsets[row] : self.row_offsets[row + 1]]


Batches = Callable[..., Iterator[MicroBatch]]
"""(what `write` wrote, rows of a micro-batch[, way]) -> micro-batches without end, each epoch in a random order."""


def open_flat(folder: Path) -> Flat:
    offsets, lengths = (np.load(folder / f"{name}.npy") for name in ("row_offsets", "segment_length"))
    tokens = np.memmap(folder / "tokens.bin", np.uint16, "r", shape=(len(offsets) - 1, LENGTH))
    return Flat(np.asarray(tokens), offsets, lengths)  # a plain array: memmap's own indexing is slower


def collate(tokens: Sequence[np.ndarray], lengths: Sequence[np.ndarray]) -> MicroBatch:
    """Lay rows end to end: tokens [L] and lengths of segments of each. As plain and as fast as NumPy allows."""
    pieces: list[int] = []
    padding: list[int] = []
    for of_row in lengths:
        pieces += of_row.tolist()
        tail = LENGTH - int(of_row.sum())
        if tail:
            padding.append(len(pieces))
            pieces.append(tail)
    ids = np.concatenate(tokens).astype(np.int64)
    borders = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum(pieces, out=borders[1:])
    labels = np.empty_like(ids)
    labels[:-1] = ids[1:]
    labels[borders[1:] - 1] = IGNORE
    for piece in padding:
        labels[borders[piece] : borders[piece + 1]] = IGNORE
    return MicroBatch(
        torch.from_numpy(ids[None]),
        torch.from_numpy(labels[None]),
        torch.from_numpy((np.arange(len(ids)) - np.repeat(borders[:-1], pieces))[None]),
        torch.from_numpy(borders.astype(np.int32)),
        max(pieces),
    )


class FullBatch(NamedTuple):
    """A `MicroBatch` and what llmt's attention and losses need besides, which `collate` of llmt makes too."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    segment_ids_flat: torch.Tensor
    """[N] int32; number of each token's piece."""
    label_places: torch.Tensor
    """[labels] int64; where a label is."""


def complete(batch: MicroBatch) -> FullBatch:
    borders, labels = batch.cu_seqlens.numpy(), batch.labels[0].numpy()
    pieces = np.repeat(np.arange(len(borders) - 1, dtype=np.int32), np.diff(borders))
    return FullBatch(*batch, torch.from_numpy(pieces), torch.from_numpy(np.flatnonzero(labels != IGNORE)))


def main(batches: Batches, write: Callable[[Path, Path], None] | None = None) -> None:
    """Do what the command line says; ``write(flat_folder, output)`` is missing where the rows are there already."""
    verb, path, argument, *options = sys.argv[1:]
    if verb == "write" and write is not None:
        write(Path(path), Path(argument))
    elif verb == "check":
        print(_sum_of_hashes(batches(Path(path), 1, *options), int(argument)))
    else:
        _serve(batches(Path(path), int(argument), *options), int(argument))


def _sum_of_hashes(stream: Iterator[MicroBatch], num_batches: int) -> str:
    """Micro-batches of one row each: the same for all loaders after a whole epoch, whatever its order."""
    total = 0
    for batch in islice(stream, num_batches):
        tensors = (batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens)
        content = b"".join(str((x.dtype, x.shape)).encode() + x.numpy().tobytes() for x in tensors)
        digest = hashlib.blake2b(content + str(batch.max_seqlen).encode(), digest_size=16).digest()
        total += int.from_bytes(digest, "little")
    return f"{total % (1 << 128):032x}"


def _serve(stream: Iterator[MicroBatch], micro_rows: int) -> None:
    for _ in range(-(-WARM_UP // micro_rows)):
        next(stream)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, most_rows = line.split()
        print(json.dumps(_read(stream, micro_rows, float(seconds), int(most_rows))), flush=True)


def _read(stream: Iterator[MicroBatch], micro_rows: int, seconds: float, most_rows: int) -> dict[str, float]:
    rows, before = 0, _read_bytes()
    cpu, started = time.process_time(), time.perf_counter()
    while rows < most_rows and time.perf_counter() - started < seconds:
        for _ in range(8):  # reading the clock costs nothing to speak of
            next(stream)
        rows += 8 * micro_rows
    return {
        "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu, "rows": rows,
        "batches": rows // micro_rows, "disk_bytes": _read_bytes() - before,
    }  # fmt: skip


def _read_bytes() -> int:
    """Bytes that this process had fetched from storage so far."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["read_bytes"])
