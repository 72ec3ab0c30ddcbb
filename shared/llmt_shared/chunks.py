"""Zarr arrays read chunk by chunk: where a chunk lies (mapped, fetched, asked for by ranges) is another's to know.

Chunks hold raw little-endian C-order data and a 4-byte CRC-32C (FORMAT.md), so a chunk file is mapped as it is.
"""

import json
import math
import mmap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llmt_shared.errors import FormatError
from llmt_shared.order import RowOrder
from llmt_shared.segments import ranges

CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]
CRC_BYTES = 4
_MAX_OPEN = 128  # mapped chunk files per array; a map costs a file descriptor and a few kB


class Layout(NamedTuple):
    """What one chunk file holds."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def item_bytes(self) -> int:
        """Of one element of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def file(self, array: Path, chunk: int) -> Path:
        """Where a chunk of an array lies, from the array's directory."""
        return array / "c" / "/".join([str(chunk)] + ["0"] * (len(self.shape) - 1))


class ArrayChunks(Protocol):
    """The chunk files of one array."""

    @property
    def is_mapped(self) -> bool:
        """Whether a whole chunk costs no more than what is used of it."""

    def read(self, chunk: int, start: int, stop: int) -> NDArray[Any]:
        """Return elements ``start`` to ``stop`` of a chunk's first axis, read-only; they stay while they are held."""

    def will_need(self, chunk: int, places: Sequence[int]) -> None:
        """Elements at these places of a chunk are read soon."""


class Chunks(Protocol):
    """Where the chunk files of a split's arrays are."""

    def of(self, array: Path, layout: Layout, *, is_read_in_order: bool) -> ArrayChunks:
        """Return the chunks of one array.

        Args:
            array: its directory.
            layout: what each chunk holds.
            is_read_in_order: else a kernel that reads ahead would fetch megabytes for each element, and more data than
                fit into memory would push one another out.
        """

    def follow(self, split: Path, order: RowOrder | None) -> AbstractContextManager[Callable[[int], None]]:
        """While the block runs, rows of a split (its folder) are taken in an order; ``None``: from first to last.

        What it gives is told the place of the next row, each time that it is another.
        """


class ChunkedArray:
    """One Zarr array, read in slices of its first axis; `ArrayFolder` opens it."""

    def __init__(self, path: Path, chunks: Chunks, *, is_read_in_order: bool = True) -> None:
        """Read the metadata.

        Args:
            path: the array's directory.
            chunks: where the chunk files are.
            is_read_in_order: see `Chunks.of`.
        """
        self.path = path
        self.shape, self.dtype, self.chunk_shape = _read_metadata(path)
        self._chunks = chunks.of(path, Layout(self.chunk_shape, self.dtype), is_read_in_order=is_read_in_order)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, item: slice) -> NDArray[Any]:
        """Return a copy of ``array[start:stop]``; a step is not supported."""
        start, stop, step = item.indices(len(self))
        if step != 1:
            raise ValueError("only plain slices")
        out = self._empty(max(0, stop - start))
        place = 0
        while place < len(out):
            chunk, first = divmod(start + place, self.chunk_shape[0])
            last = min(first + len(out) - place, self.chunk_shape[0])
            out[place : place + last - first] = self._chunks.read(chunk, first, last)
            place += last - first
        return out

    def take(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[Any]:
        """Return ``array[indices]`` of the first axis, in the order asked for."""
        out = self._empty(len(indices))
        for chunk, members in self._by_chunk(indices).items():
            if self._chunks.is_mapped:
                values = self._chunks.read(chunk, 0, self.chunk_shape[0])
                for place, offset in members:
                    out[place] = values[offset]
            else:
                for place, offset in members:
                    out[place] = self._chunks.read(chunk, offset, offset + 1)[0]
        return out

    def slices(self, borders: NDArray[np.int64]) -> NDArray[Any]:
        """Return ``array[first:last]`` of [n, 2] borders inside the array, one after another."""
        indices = ranges(borders[:, 0], borders[:, 1] - borders[:, 0])
        chunks, offsets = np.divmod(indices, self.chunk_shape[0])
        out = self._empty(len(indices))
        for chunk in np.bincount(chunks).nonzero()[0].tolist():
            mine = (chunks == chunk).nonzero()[0]
            wanted = offsets[mine]
            if self._chunks.is_mapped:
                out[mine] = self._chunks.read(chunk, 0, self.chunk_shape[0])[wanted]
            else:
                first = int(wanted.min())
                out[mine] = self._chunks.read(chunk, first, int(wanted.max()) + 1)[wanted - first]
        return out

    def will_need(self, indices: Sequence[int] | NDArray[np.integer]) -> None:
        """Begin to fetch ``array[indices]`` in the background, where that can be done."""
        for chunk, members in self._by_chunk(indices).items():
            self._chunks.will_need(chunk, [offset for _, offset in members])

    def _by_chunk(self, indices: Sequence[int] | NDArray[np.integer]) -> dict[int, list[tuple[int, int]]]:
        """Of each chunk, in the order in which they first appear: places among the indices, and in the chunk."""
        found = np.asarray(indices).tolist()  # NumPy's own numbers are slow to reckon with
        if found and not 0 <= min(found) <= max(found) < self.shape[0]:
            raise IndexError(f"{self.path}: {found} are not all in 0 .. {self.shape[0]}")
        members: dict[int, list[tuple[int, int]]] = {}
        for place, index in enumerate(found):
            chunk, offset = divmod(index, self.chunk_shape[0])
            members.setdefault(chunk, []).append((place, offset))
        return members

    def _empty(self, count: int) -> NDArray[Any]:
        return np.empty((count, *self.shape[1:]), self.dtype)


class _Mapped(NamedTuple):
    values: NDArray[Any]
    memory: mmap.mmap


class MappedChunks:
    """Chunk files of an array on a disk, mapped; a bounded number stays so."""

    is_mapped = True

    def __init__(self, array: Path, layout: Layout, *, is_read_in_order: bool) -> None:
        self._array, self._layout, self._is_read_in_order = array, layout, is_read_in_order
        self._chunk = lru_cache(maxsize=_MAX_OPEN)(self._map)

    def read(self, chunk: int, start: int, stop: int) -> NDArray[Any]:
        """Return a part of the map."""
        return self._chunk(chunk).values[start:stop]

    def will_need(self, chunk: int, places: Sequence[int]) -> None:
        """Have the kernel fetch elements in the background; does nothing where it cannot be told so."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        memory, size = self._chunk(chunk).memory, self._layout.item_bytes
        for place in places:
            before = place * size % mmap.PAGESIZE
            memory.madvise(mmap.MADV_WILLNEED, place * size - before, size + before)

    def _map(self, chunk: int) -> _Mapped:
        path, (shape, dtype) = self._layout.file(self._array, chunk), self._layout
        try:
            with path.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            values = np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
        except (OSError, ValueError) as error:
            raise FormatError(f"{path}: cannot be mapped ({error}); run `llmt-prep verify`") from None
        if not self._is_read_in_order and hasattr(mmap, "MADV_RANDOM"):
            memory.madvise(mmap.MADV_RANDOM)
        return _Mapped(values, memory)


class DiskChunks:
    """Chunk files in the arrays' own directories."""

    def of(self, array: Path, layout: Layout, *, is_read_in_order: bool) -> ArrayChunks:
        """Map them as they are asked for."""
        return MappedChunks(array, layout, is_read_in_order=is_read_in_order)

    def follow(self, split: Path, order: RowOrder | None) -> AbstractContextManager[Callable[[int], None]]:
        """Do nothing: all chunks are there."""
        return unfollowed()


def unfollowed() -> AbstractContextManager[Callable[[int], None]]:
    """Return what `follow` gives where nothing is fetched ahead."""
    return nullcontext(lambda place: None)


class ArrayFolder(NamedTuple):
    """The arrays of one split."""

    path: Path
    """Their metadata lies there."""
    chunks: Chunks = DiskChunks()
    """Where their chunk files are."""

    def open(self, name: str, *, is_read_in_order: bool = True) -> ChunkedArray:
        """Open one array; see `Chunks.of`."""
        return ChunkedArray(self.path / name, self.chunks, is_read_in_order=is_read_in_order)

    def has(self, name: str) -> bool:
        """Whether there is an array of this name."""
        return (self.path / name).exists()


def _read_metadata(path: Path) -> tuple[tuple[int, ...], np.dtype[Any], tuple[int, ...]]:
    """Shape, dtype and chunk shape of an array."""
    try:
        meta: dict[str, Any] = json.loads((path / "zarr.json").read_bytes())
        codecs = [{key: value for key, value in codec.items() if value} for codec in meta["codecs"]]
        grid = meta["chunk_grid"]
        shape, chunk_shape = tuple(meta["shape"]), tuple(grid["configuration"]["chunk_shape"])
        dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        is_known = codecs == CODECS and grid["name"] == "regular"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}/zarr.json: not a Zarr v3 array ({error!r}); run `llmt-prep verify`") from None
    if not is_known:
        raise FormatError(f"{path}: codecs {codecs}; wanted raw little-endian bytes with crc32c, as FORMAT.md says")
    return shape, dtype, chunk_shape
