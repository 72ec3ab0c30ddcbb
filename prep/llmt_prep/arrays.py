"""How arrays are written: plain Zarr v3, each chunk file the raw little-endian array and its CRC-32C.

Metadata is written here and not by the zarr package, so that a dataset's bytes do not change with that package's
version; `llmt-prep verify` and the tests read everything back through zarr.

Bytes are hashed on their way to the disk, so that nobody has to read them again for the manifest.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from llmt_shared import durable

COLUMN_CHUNK = 1_048_576
"""Elements in a chunk of a one-dimensional array."""

_PIECE = 1 << 20
"""Bytes that are summed, hashed and written while they lie in the processor's cache."""


def write_group(path: Path, attributes: dict[str, Any]) -> None:
    """Make a directory a Zarr group."""
    _write_json(path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})


def write_metadata(path: Path, shape: tuple[int, ...], chunk_shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Write the zarr.json of one array."""
    from llmt_shared.chunks import CODECS  # a worker that only writes chunks can do without

    meta = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": CODECS,
        "attributes": {},
    }
    _write_json(path / "zarr.json", meta)


def column_bytes(length: int, itemsize: int) -> int:
    """Return the bytes of a one-dimensional array's chunk files; of ``width`` columns, ``itemsize`` is a row's."""
    size = max(1, min(length, COLUMN_CHUNK))
    return -(-length // size) * (size * itemsize + 4)


class ChunkWriter:
    """A chunk file that is being written; `writing_chunk` gives one."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size
        self._crc = 0
        self._hash = hashlib.sha256()

    def add(self, values: NDArray[Any]) -> None:
        """Append values of any shape, in C order."""
        little = values.astype(values.dtype.newbyteorder("<"), copy=False)
        raw = np.ascontiguousarray(little).reshape(-1).view(np.uint8)
        self._left -= raw.size
        for start in range(0, raw.size, _PIECE):
            piece = raw[start : start + _PIECE]
            self._crc = google_crc32c.extend(self._crc, piece)
            self._write(piece.data)
        _start_writing(self._file, raw.size)

    def finish(self) -> None:
        """Fill up with zeros, then append the checksum; the last call but `sha256`."""
        assert self._left >= 0, f"{self._file.name}: {-self._left} bytes more than the chunk has"
        zeros = np.zeros(min(_PIECE, self._left), np.uint8)
        while self._left:
            self.add(zeros[: self._left])
        self._write(self._crc.to_bytes(4, "little"))

    def sha256(self) -> str:
        """Of the whole file."""
        return self._hash.hexdigest()

    def _write(self, content: bytes | memoryview) -> None:
        self._hash.update(content)
        self._file.write(content)


class ColumnWriter:
    """An array that is written as its parts arrive; one chunk is held in memory.

    It has one dimension, or ``width`` columns where that is said.
    """

    def __init__(self, path: Path, length: int, dtype: str, width: int | None = None) -> None:
        size = max(1, min(length, COLUMN_CHUNK))
        columns = () if width is None else (width,)
        write_metadata(path, (length, *columns), (size, *columns), np.dtype(dtype))
        self.sha256: dict[Path, str] = {}
        """Of each chunk file so far."""
        self._path, self._length = path, length
        self._buffer = np.zeros((size, *columns), dtype)
        self._filled = self._written = 0

    def add(self, part: NDArray[Any]) -> None:
        """Append values."""
        size = len(self._buffer)
        while len(part):
            count = min(size - self._filled, len(part))
            self._buffer[self._filled : self._filled + count] = part[:count]
            self._filled, part = self._filled + count, part[count:]
            if self._filled == size:
                self._write_chunk()

    def finish(self) -> None:
        """Write the last chunk; all values must be there."""
        if self._filled:
            self._buffer[self._filled :] = 0  # the last chunk is padded to full size
            self._write_chunk()
        assert self._written == self._length, f"{self._path}: {self._written} elements, {self._length} promised"

    def _write_chunk(self) -> None:
        path = self._path / "c" / "/".join([str(len(self.sha256)), *("0" for _ in self._buffer.shape[1:])])
        self.sha256[path] = write_chunk(path, self._buffer)
        self._written += self._filled
        self._filled = 0


@contextmanager
def writing_chunk(path: Path, size: int) -> Iterator[ChunkWriter]:
    """Write a chunk file of ``size`` bytes and a checksum; what is not added is 0.

    A chunk of zeros is written too, for a missing file must mean a damaged dataset.
    """
    with durable.writing(path) as file:
        writer = ChunkWriter(file, size)
        yield writer
        writer.finish()


def write_chunk(path: Path, chunk: NDArray[Any]) -> str:
    """Write one chunk file; returns its sha256."""
    with writing_chunk(path, chunk.nbytes) as writer:
        writer.add(chunk)
    return writer.sha256()


def write_column(path: Path, parts: Iterable[NDArray[Any]], length: int, dtype: str) -> None:
    """Write a one-dimensional array of ``length`` elements from parts."""
    writer = ColumnWriter(path, length, dtype)
    for part in parts:
        writer.add(part)
    writer.finish()


def _start_writing(file: BinaryIO, size: int) -> None:
    """Have the last ``size`` bytes written to the disk while more is made: the fsync at the end then waits a fifth."""
    if hasattr(os, "posix_fadvise"):  # on Linux, pages that are not needed are written first, and kept till then
        file.flush()
        os.posix_fadvise(file.fileno(), file.tell() - size, size, os.POSIX_FADV_DONTNEED)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    durable.write(path, json.dumps(value, indent=1) + "\n")
