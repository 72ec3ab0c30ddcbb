"""A small dataset on disk, written by hand as FORMAT.md says, for tests of training that need no packing."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from llmt_shared.manifest import FileEntry, Manifest, SplitEntry, TokenizerEntry

WORDS = 40
SOURCES = ("web", "code")


def write_dataset(
    path: Path,
    *,
    length: int = 16,
    num_rows: int = 24,
    validation_rows: int = 4,
    seed: int = 0,
    words: int = WORDS,
    rows_per_shard: int | None = None,
) -> Path:
    """Rows of random segments over two sources; token k is the word ``wk``, the last one is ``</s>``.

    ``rows_per_shard`` cuts all arrays: those of rows into chunks of twice as many, those of segments of 4 times.
    """
    tokenizer = write_tokenizer(path / "tokenizer", words)
    random = np.random.default_rng(seed)
    splits = {"train": _write_split(path / "train", random, num_rows, length, words, rows_per_shard)}
    if validation_rows:
        splits["validation"] = _write_split(path / "validation", random, validation_rows, length, words)
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    manifest = Manifest(
        format=1, kind="pretrain", length=length, sources=SOURCES, tokenizer=tokenizer, recipe="none", splits=splits,
        files=tuple(_entry(path, name) for name in names),
    )  # fmt: skip
    (path / "MANIFEST.json").write_text(manifest.model_dump_json(indent=1))
    return path


def write_tokenizer(path: Path, words: int = WORDS) -> TokenizerEntry:
    path.mkdir(parents=True, exist_ok=True)
    vocabulary = {f"w{index}": index for index in range(words - 2)} | {"<unk>": words - 2, "</s>": words - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return TokenizerEntry(digest="none", vocab_size=words, max_id=words - 1, bos_id=None, eos_id=words - 1, pad_id=None)


def _write_split(
    path: Path, random: np.random.Generator, num_rows: int, length: int, words: int, per_chunk: int | None = None
) -> SplitEntry:
    tokens = np.zeros((num_rows, length), np.uint16)
    lengths: list[int] = []
    offsets, targets = [0], []
    for row in tokens:
        sizes = _cut(random, length)
        # Words follow one another, so that there is something to learn.
        row[: sum(sizes)] = (random.integers(words) + np.arange(sum(sizes))) % words
        lengths += sizes
        offsets.append(len(lengths))
        targets.append(sum(size - 1 for size in sizes))
    number = np.arange(len(lengths))
    by_row = {"tokens": tokens, "row_offsets": np.array(offsets, np.int64), "row_targets": np.array(targets, np.uint32)}
    by_segment = {
        "length": np.array(lengths, np.uint32),
        "offset": np.zeros(len(lengths), np.uint32),
        "document": number.astype(np.uint64),
        "source": (number % len(SOURCES)).astype(np.uint16),
    }
    for name, array in by_row.items():
        _write(path / name, array, len(array) if per_chunk is None else per_chunk * (1 if name == "tokens" else 2))
    for name, array in by_segment.items():
        _write(path / f"segment_{name}", array, len(array) if per_chunk is None else 4 * per_chunk)
    return SplitEntry(rows=num_rows, segments=len(lengths), tokens=sum(lengths), targets=sum(targets))


def _cut(random: np.random.Generator, length: int) -> list[int]:
    sizes: list[int] = []
    while (free := length - sum(sizes)) > 2 and len(sizes) < 4:
        sizes.append(int(random.integers(1, free)))  # no segment fills its row
    return sizes


def _write(path: Path, array: NDArray, per_chunk: int) -> None:
    """Chunks: the raw array, the last one padded, and four bytes of a checksum, which only `llmt-prep verify` reads."""
    for number, start in enumerate(range(0, len(array), per_chunk)):
        chunk = path / "c" / "/".join([str(number), *["0"] * (array.ndim - 1)])
        chunk.parent.mkdir(parents=True, exist_ok=True)
        part = np.zeros((per_chunk, *array.shape[1:]), array.dtype)
        part[: len(array) - start] = array[start : start + per_chunk]
        chunk.write_bytes(part.tobytes() + bytes(4))
    chunk_shape = (per_chunk, *array.shape[1:])
    (path / "zarr.json").write_text(json.dumps(_metadata(array.shape, chunk_shape, array.dtype.name)))


def _metadata(shape: Sequence[int], chunk_shape: Sequence[int], data_type: str) -> dict:
    return {
        "zarr_format": 3, "node_type": "array", "shape": list(shape), "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }  # fmt: skip


def _entry(path: Path, name: str) -> FileEntry:
    content = (path / name).read_bytes()
    return FileEntry(path=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
