"""How a packed dataset is read: rows, segments and pairs from its arrays; nothing is copied before it is used.

It lies in a folder, or below a URL: then all files but the arrays' chunks are copied when it is opened, and chunks are
read by ranges, or kept by whoever opens it (training). Opening compares names and sizes with the manifest; contents are
what `llmt-prep verify` checks.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_shared.chunks import ArrayFolder, ChunkedArray, Chunks, DiskChunks
from llmt_shared.manifest import Manifest, TokenizerEntry, read_manifest, refuse_wrong_files, wrong_files
from llmt_shared.mirror import Mirror, RangedChunks, mirrored
from llmt_shared.objects import Location, ObjectPath, named_location
from llmt_shared.order import RowOrder
from llmt_shared.segments import Spans, expand

_BLOCK = 1 << 20  # elements that are looked at together


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


class Split:
    """The rows of one split."""

    def __init__(
        self, path: Location, arrays: ArrayFolder, *, has_spans: bool = False, has_pairs: bool = False
    ) -> None:
        """Open the arrays.

        Args:
            path: where the split is, for messages.
            arrays: its arrays.
            has_spans: whether targets are said; else every token is one.
            has_pairs: whether segments form preference pairs.
        """
        self.path, self.arrays = path, arrays
        self._tokens = arrays.open("tokens", is_read_in_order=False)
        self.row_targets = arrays.open("row_targets")
        self._row_offsets = arrays.open("row_offsets")
        self._columns = [arrays.open(f"segment_{name}") for name in SegmentTable._fields[1:]]
        self.num_rows, self.length = self._tokens.shape
        self._spans = _opened(arrays, "span_offsets", "span_start", "span_length") if has_spans else None
        self._pairs = _opened(arrays, "pair_offsets", "pair_segments", "row_chosen_targets") if has_pairs else None

    def __len__(self) -> int:
        return int(self.num_rows)

    def __getitem__(self, row: int) -> Row:
        tokens, table, spans = self.tokens([row]), self.segments([row]), self.spans([row])
        dense = expand(tokens, table.per_row, table.length, spans)
        return Row(tokens[0], dense.segment_ids, dense.position_ids, dense.cu_seqlens, dense.labels, table, spans)

    @property
    def rows_per_shard(self) -> int:
        """Rows of one chunk file of tokens."""
        return self._tokens.chunk_shape[0]

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

    def follow(self, order: RowOrder | None) -> AbstractContextManager[Callable[[int], None]]:
        """Have what comes fetched ahead while the block runs, where rows are not on this machine.

        Args:
            order: in which rows are taken; ``None``: from the first to the last.

        Returns:
            What it gives is told the place of the next row in the order; rows before it are not asked for again.
        """
        return self.arrays.chunks.follow(self.arrays.path, order)

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

    path: Location
    """As it was named."""
    folder: Path
    """Where all files lie but, of a dataset below a URL, the chunks of its arrays."""
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
        return self.folder / "tokenizer"


def open_dataset(path: Location | str) -> Dataset:
    """Open a finished dataset; compares names and sizes of all files with the manifest.

    Args:
        path: its folder or URL; of one below a URL, small files are copied to a temporary folder.

    Raises:
        FormatError: unfinished, of another format, or with files missing, truncated or oversized.
        StoreError: the object store gives no answer.
    """
    location = named_location(path) if isinstance(path, str) else path
    if isinstance(location, ObjectPath):
        folder = _temporary_folder()
        return open_mirror(mirrored(location, folder), RangedChunks(location, folder))
    manifest, digest = read_manifest(location)
    refuse_wrong_files(wrong_files(location, manifest))
    return open_mirror(Mirror(location, location, manifest, digest), DiskChunks())


def open_mirror(mirror: Mirror, chunks: Chunks) -> Dataset:
    """Open a dataset, wherever the chunks of its arrays are.

    Args:
        mirror: its files but, perhaps, those chunks.
        chunks: where those are.
    """
    location, folder, manifest, digest = mirror
    opened = partial(Split, has_spans=manifest.kind != "pretrain", has_pairs=manifest.kind == "preference")
    splits = {name: opened(location / name, ArrayFolder(folder / name, chunks)) for name in manifest.splits}
    return Dataset(location, folder, manifest, digest, splits["train"], splits.get("validation"))


_temporary: list[tempfile.TemporaryDirectory[str]] = []
"""Folders that go when the process ends."""


def _temporary_folder() -> Path:
    _temporary.append(tempfile.TemporaryDirectory(prefix="llmt-dataset-"))
    return Path(_temporary[-1].name)


def _opened(arrays: ArrayFolder, *names: str) -> tuple[ChunkedArray, ...]:
    return tuple(arrays.open(name) for name in names)
