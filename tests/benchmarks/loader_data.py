"""Packed rows that are made up: as flat files, from which every other format is written, and in llmt's.

Documents as long as those of the web, of random tokens, packed by llmt-prep's own best-fit-decreasing.
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from packing_peers import lengths_like

from llmt_prep import arrays
from llmt_prep.packing import PackedRows, Pieces, pack, row_tokens, take_rows
from llmt_prep.shards import num_shards, rows_per_shard
from llmt_shared.manifest import FileEntry, Manifest, SplitEntry, TokenizerEntry

LENGTH = 4096
VOCABULARY = 32_768
SHARD_BYTES = 256_000_000
"""The default of llmt-prep."""


def write_rows(folder: Path, num_rows: int) -> None:
    """Write `flat/` (tokens.bin, row_offsets.npy, segment_length.npy) and the dataset `llmt/` of the same rows."""
    rows, random = _packed(num_rows), np.random.default_rng(0)
    per_shard = rows_per_shard(num_rows, LENGTH, 2, SHARD_BYTES)
    (folder / "flat").mkdir(parents=True)
    np.save(folder / "flat" / "row_offsets.npy", rows.offsets)
    np.save(folder / "flat" / "segment_length.npy", rows.items.length.astype(np.uint16))
    train = folder / "llmt" / "train"
    with (folder / "flat" / "tokens.bin").open("wb") as flat:
        for shard in range(num_shards(num_rows, per_shard)):
            filled = row_tokens(rows)[shard * per_shard :][:per_shard]
            tokens = random.integers(VOCABULARY, size=(per_shard, LENGTH), dtype=np.uint16)
            tokens[: len(filled)] *= np.arange(LENGTH) < filled[:, None]
            tokens[: len(filled)].tofile(flat)
            tokens[len(filled) :] = 0
            arrays.write_chunk(train / "tokens" / "c" / str(shard) / "0", tokens)
    arrays.write_metadata(train / "tokens", (num_rows, LENGTH), (per_shard, LENGTH), np.dtype(np.uint16))
    _write_columns(train, rows)
    _write_manifest(folder / "llmt", rows)


def _packed(num_rows: int) -> PackedRows[Pieces]:
    num_documents = num_rows * 6  # 827 tokens each, so a fifth more than the rows hold
    return take_rows(pack(lengths_like("web", num_documents), LENGTH, "split"), np.arange(num_rows))


def _write_columns(train: Path, rows: PackedRows[Pieces]) -> None:
    pieces, num_segments = rows.items, len(rows.items.length)
    columns: dict[str, tuple[str, NDArray[np.integer]]] = {
        "row_offsets": ("int64", rows.offsets),
        "row_targets": ("uint32", row_tokens(rows) - np.diff(rows.offsets)),
        "segment_length": ("uint32", pieces.length),
        "segment_offset": ("uint32", pieces.offset),
        "segment_document": ("uint64", pieces.document),
        "segment_source": ("uint16", np.zeros(num_segments)),
    }
    for name, (dtype, values) in columns.items():
        arrays.write_column(train / name, [values], len(values), dtype)


def _write_manifest(path: Path, rows: PackedRows[Pieces]) -> None:
    tokens, segments = int(rows.items.length.sum()), len(rows.items.length)
    tokenizer = TokenizerEntry(
        digest="none", vocab_size=VOCABULARY, max_id=VOCABULARY - 1, bos_id=None, eos_id=None, pad_id=None
    )
    split = SplitEntry(rows=len(rows.offsets) - 1, segments=segments, tokens=tokens, targets=tokens - segments)
    files = sorted(each for each in path.rglob("*") if each.is_file())
    manifest = Manifest(
        format=1, kind="pretrain", length=LENGTH, sources=("web",), tokenizer=tokenizer, recipe="none",
        splits={"train": split},
        files=tuple(_entry(each, path) for each in files),
    )  # fmt: skip
    (path / "MANIFEST.json").write_text(manifest.model_dump_json(indent=1))


def _entry(file: Path, path: Path) -> FileEntry:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return FileEntry(path=file.relative_to(path).as_posix(), bytes=file.stat().st_size, sha256=digest)
