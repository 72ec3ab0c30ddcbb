"""How a packed dataset is read: memory-mapped chunk files of plain Zarr v3 arrays, nothing copied before it is used.

Chunks hold raw little-endian C-order data and a 4-byte CRC-32C (FORMAT.md), so a chunk file is mapped as it is. The
CRC and the manifest's sha256 are what `llmt-prep verify` checks; opening compares names and sizes.
"""

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_shared.errors import FormatError
from llmt_shared.manifest import Manifest, TokenizerEntry, read_manifest, wrong_files
from llmt_shared.segments import Spans, expand, ranges

CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]
_BLOCK = 1 << 20  # elements that are looked at together
_MAX_OPEN = 128  # mapped chunk files per array; a map costs a file descriptor and a few kB


class RowSegments(NamedTuple):
    """The segments of some rows, row by row, without where they come from; S of them."""

    per_row: NDArray[np.int64]
    """[R] segments of each row."""
    length: NDArray[np.uint32]
    """[S] tokens."""
    source: NDArray[np.uint16]
    """[S] index into the manifest's sources."""


class SegmentTable(NamedTuple):
    """The segments of some rows, row by row; S of them."""

    per_row: NDArray[np.int64]
    """[R] segments of each row."""
    length: NDArray[np.uint32]
    """[S] tokens."""
    offset: NDArray[np.uint32]
    """[S] where in its document the segment starts, in tokens."""
    document: NDArray[np.uint64]
    """[S] first_document of its file (files.parquet) + record number."""
    source: NDArray[np.uint16]
    """[S] index into the manifest's sources."""


class Row(NamedTuple):
    """One row with everything that is derived from it; L tokens, P pieces (segments and the padding tail)."""

    tokens: NDArray[np.integer]
    segment_ids: NDArray[np.int32]
    """[L]; 1, 2, ..; 0 is padding."""
    position_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    """[P + 1]; from 0 to L."""
    labels: NDArray[np.int64]
    """[L]; the next token inside the segment, else -100."""
    segments: SegmentTable
    spans: Spans | None
    """Runs of targets in the row, of chats and pairs; ``None``: every token is one."""


class PairTable(NamedTuple):
    """The preference pairs of some rows, row by row; P of them."""

    per_row: NDArray[np.int64]
    """[R] pairs of each row."""
    segments: NDArray[np.int64]
    """[P, 2] chosen and rejected segment, counted through all segments of these rows."""
    numbers: NDArray[np.int64]
    """[P, 2] the same, counted through all segments of the split."""
    chosen_targets: NDArray[np.uint32]
    """[R] targets on the chosen sides of each row."""


class _Chunk(NamedTuple):
    """One chunk file, mapped."""

    values: NDArray[Any]
    memory: mmap.mmap


class ChunkedArray:
    """One Zarr array, read in slices of its first axis; keeps a bounded number of chunk files mapped."""

    def __init__(self, path: Path, *, is_read_in_order: bool = True) -> None:
        """Read the metadata.

        Args:
            path: the array's directory.
            is_read_in_order: let the kernel read ahead. Where elements are read in random order it must not: it would
                fetch megabytes for each, and more data than fit into memory would push one another out.
        """
        self.path = path
        self.shape, self.dtype, self.chunk_shape = _read_metadata(path)
        self._is_read_in_order = is_read_in_order
        self._chunk = lru_cache(maxsize=_MAX_OPEN)(self._map)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, item: slice) -> NDArray[Any]:
        """Return a copy of ``array[start:stop]``; a step is not supported."""
        start, stop, step = item.indices(len(self))
        if step != 1:
            raise ValueError("only plain slices")
        return self._joined(self._views(start, stop))

    def take(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[Any]:
        """Return ``array[indices]`` of the first axis, in the order asked for."""
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        for place, (chunk, offset) in enumerate(self._places(indices)):
            out[place] = self._chunk(chunk).values[offset]
        return out

    def slices(self, borders: NDArray[np.int64]) -> NDArray[Any]:
        """Return ``array[first:last]`` of [n, 2] borders inside the array, one after another."""
        indices = ranges(borders[:, 0], borders[:, 1] - borders[:, 0])
        chunks, offsets = np.divmod(indices, self.chunk_shape[0])
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        for chunk in np.bincount(chunks).nonzero()[0].tolist():
            mine = (chunks == chunk).nonzero()[0]
            out[mine] = self._chunk(chunk).values[offsets[mine]]
        return out

    def will_need(self, indices: Sequence[int] | NDArray[np.integer]) -> None:
        """Have the kernel fetch ``array[indices]`` in the background; does nothing where it cannot be told so."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        size = math.prod(self.chunk_shape[1:]) * self.dtype.itemsize
        for chunk, offset in self._places(indices):
            before = offset * size % mmap.PAGESIZE
            self._chunk(chunk).memory.madvise(mmap.MADV_WILLNEED, offset * size - before, size + before)

    def _places(self, indices: Sequence[int] | NDArray[np.integer]) -> list[tuple[int, int]]:
        """Chunk of each index, and its place there."""
        found = np.asarray(indices).tolist()  # NumPy's own numbers are slow to reckon with
        if found and not 0 <= min(found) <= max(found) < self.shape[0]:
            raise IndexError(f"{self.path}: {found} are not all in 0 .. {self.shape[0]}")
        return [divmod(index, self.chunk_shape[0]) for index in found]

    def _views(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Yield ``array[start:stop]`` chunk by chunk."""
        while start < stop:
            chunk, first = divmod(start, self.chunk_shape[0])
            last = min(first + stop - start, self.chunk_shape[0])
            yield self._chunk(chunk).values[first:last]
            start += last - first

    def _joined(self, parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([np.empty((0, *self.shape[1:]), self.dtype), *parts])

    def _map(self, chunk: int) -> _Chunk:
        path = self.path / "c" / "/".join([str(chunk)] + ["0"] * (len(self.shape) - 1))
        try:
            with path.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            values = np.frombuffer(memory, self.dtype, math.prod(self.chunk_shape)).reshape(self.chunk_shape)
        except (OSError, ValueError) as error:
            raise FormatError(f"{path}: cannot be mapped ({error}); run `llmt-prep verify`") from None
        if not self._is_read_in_order and hasattr(mmap, "MADV_RANDOM"):
            memory.madvise(mmap.MADV_RANDOM)
        return _Chunk(values, memory)


class Split:
    """The rows of one split."""

    def __init__(self, path: Path, *, has_spans: bool = False, has_pairs: bool = False) -> None:
        self.path = path
        self._tokens = ChunkedArray(path / "tokens", is_read_in_order=False)
        self.row_targets = ChunkedArray(path / "row_targets")
        self._row_offsets = ChunkedArray(path / "row_offsets")
        self._columns = [ChunkedArray(path / f"segment_{name}") for name in SegmentTable._fields[1:]]
        self.num_rows, self.length = self._tokens.shape
        self._spans = _arrays(path, "span_offsets", "span_start", "span_length") if has_spans else None
        self._pairs = _arrays(path, "pair_offsets", "pair_segments", "row_chosen_targets") if has_pairs else None

    def __len__(self) -> int:
        return int(self.num_rows)

    def __getitem__(self, row: int) -> Row:
        tokens, table, spans = self.tokens([row]), self.segments([row]), self.spans([row])
        dense = expand(tokens, table.per_row, table.length, spans)
        return Row(tokens[0], dense.segment_ids, dense.position_ids, dense.cu_seqlens, dense.labels, table, spans)

    @property
    def num_segments(self) -> int:
        """Segments of all rows."""
        return len(self._columns[0])

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """uint16, or uint32 where the tokenizer's largest id needs it."""
        dtype: np.dtype[Any] = self._tokens.dtype
        return dtype

    def tokens(self, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[Any]:
        """[R, L] in the dtype on disk; padding is 0."""
        return self._tokens.take(rows)

    def targets(self, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint32]:
        """[R] labels that count in the loss."""
        return self.row_targets.take(rows)

    def will_need(self, rows: Sequence[int] | NDArray[np.integer]) -> None:
        """Begin to fetch the tokens of rows that are to be read soon."""
        self._tokens.will_need(rows)

    def row_segments(self, rows: Sequence[int] | NDArray[np.integer]) -> RowSegments:
        """Return what training needs of the segments of some rows, in the order of ``rows``."""
        borders = self._borders(self._row_offsets, rows)
        length, _, _, source = self._columns
        return RowSegments(borders[:, 1] - borders[:, 0], length.slices(borders), source.slices(borders))

    def segments(self, rows: Sequence[int] | NDArray[np.integer]) -> SegmentTable:
        """Return the segments of some rows, in the order of ``rows``."""
        borders = self._borders(self._row_offsets, rows)
        return SegmentTable(borders[:, 1] - borders[:, 0], *(column.slices(borders) for column in self._columns))

    def spans(self, rows: Sequence[int] | NDArray[np.integer]) -> Spans | None:
        """Return the targets of some rows laid end to end, in the order of ``rows``; ``None`` where all tokens are."""
        if self._spans is None:
            return None
        offsets, start, length = self._spans
        borders = self._borders(offsets, rows)
        place = np.repeat(np.arange(len(borders)), np.diff(borders)[:, 0]) * int(self.length)
        return Spans(place + start.slices(borders), length.slices(borders).astype(np.int64))

    def pairs(self, rows: Sequence[int] | NDArray[np.integer]) -> PairTable | None:
        """Return the preference pairs of some rows, in the order of ``rows``; ``None`` where the dataset has none."""
        if self._pairs is None:
            return None
        offsets, segments, chosen_targets = self._pairs
        borders, of_rows = self._borders(offsets, rows), self._borders(self._row_offsets, rows)
        per_row, num_segments = np.diff(borders)[:, 0], np.diff(of_rows)[:, 0]
        shift = np.cumsum(num_segments) - num_segments - of_rows[:, 0]  # from numbers in the split to those in the rows
        numbers = segments.slices(borders).astype(np.int64)
        return PairTable(per_row, numbers + np.repeat(shift, per_row)[:, None], numbers, chosen_targets.take(rows))

    def longest_segment(self) -> int:
        """Return the tokens of the longest segment."""
        lengths = self._columns[0]
        blocks = (lengths[first : first + _BLOCK] for first in range(0, len(lengths), _BLOCK))
        return max((int(block.max()) for block in blocks), default=0)

    def _borders(self, offsets: ChunkedArray, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """[R, 2] first and last of what each row owns."""
        first = np.asarray(rows, np.int64)
        if first.size and not 0 <= first.min() <= first.max() < self.num_rows:
            raise IndexError(f"{self.path}: rows {first.tolist()} are not all in 0 .. {self.num_rows}")
        return offsets.slices(np.stack([first, first + 2], axis=1)).reshape(-1, 2)


@dataclass(frozen=True)
class Dataset:
    """A finished dataset; `train` and `validation` read their files lazily."""

    path: Path
    manifest: Manifest
    digest: str
    """sha256 of MANIFEST.json: equal digests mean equal datasets, byte for byte."""
    train: Split
    validation: Split | None
    """``None`` where nothing was held out."""

    @property
    def kind(self) -> Literal["pretrain", "sft", "preference"]:
        """What a document is: text, a chat, or a pair of them."""
        return self.manifest.kind

    @property
    def tokenizer(self) -> TokenizerEntry:
        """What training must know of the tokenizer."""
        return self.manifest.tokenizer

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in the order of `segment_source`'s indices."""
        return self.manifest.sources

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer's files and chat template."""
        return self.path / "tokenizer"


def open_dataset(path: Path | str) -> Dataset:
    """Open a finished dataset; compares names and sizes of all files with the manifest.

    Raises:
        FormatError: unfinished, of another format, or with files missing, truncated or oversized.
    """
    directory = Path(path)
    manifest, digest = read_manifest(directory)
    problems = wrong_files(directory, manifest)
    if problems:
        more = f"\n({len(problems) - 5} more)" if len(problems) > 5 else ""
        raise FormatError("\n".join(problems[:5]) + more + "\nCopy the dataset again or pack it again")
    has_spans, has_pairs = manifest.kind != "pretrain", manifest.kind == "preference"
    splits = {name: Split(directory / name, has_spans=has_spans, has_pairs=has_pairs) for name in manifest.splits}
    return Dataset(directory, manifest, digest, splits["train"], splits.get("validation"))


def _arrays(path: Path, *names: str) -> tuple[ChunkedArray, ...]:
    return tuple(ChunkedArray(path / name) for name in names)


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
