"""One small corpus in every format that is read, on a disk or, with the same names, below a URL."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import object_store
import pyarrow as pa
import pyarrow.parquet as pq
import small_datasets
import small_tokenizers
import zstandard

from llmt_shared.objects import ObjectPath

UNIT_SIZE = 700
"""Smaller than most files: they fall into several units."""


def texts(count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    words = " ".join(small_tokenizers.CORPUS).split(" ")
    return [" ".join(random.choice(words, int(random.integers(1, 40)))) for _ in range(count)]


def write(folder: Path) -> Path:
    """JSON lines plain and compressed, Parquet, both forms of Arrow, text, chats and pairs; and a tokenizer."""
    small_datasets.write_chats(folder)
    small_tokenizers.save(small_tokenizers.byte_level_bpe(), folder / "tokenizer", eos_token=small_tokenizers.EOT)
    lines = [json.dumps({"text": text}) + "\n" for text in texts(24, 1)]
    lines[2], lines[5] = "\n", "{broken\n"
    (folder / "web").mkdir()
    (folder / "web" / "a.jsonl").write_text("".join(lines), "utf-8")
    (folder / "web" / "b.jsonl").write_text("".join(lines[:9]).removesuffix("\n"), "utf-8")
    (folder / "web" / "c.jsonl.zst").write_bytes(zstandard.compress("".join(lines[9:]).encode()))
    (folder / "web" / "d.jsonl.gz").write_bytes(gzip.compress("".join(lines[3:15]).encode(), mtime=0))
    table = pa.table({"text": texts(24, 2), "number": list(range(24))})
    pq.write_table(table, folder / "code.parquet", row_group_size=7)
    for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with new(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    (folder / "notes.txt").write_text("\n\n".join(texts(9, 3)), "utf-8")
    return folder


def sources(root: Path | ObjectPath) -> dict[str, Any]:
    """Of a mix: texts in every format, below a folder or URL."""
    return {
        "web": {"path": f"{root}/web/*.jsonl*"},
        "code": {"path": [f"{root}/code.parquet"]},
        "tables": {"path": f"{root}/**/*.arrow"},
        "notes": {"path": f"{root}/notes.txt", "record": "paragraph"},
    }


def mix(folder: Path, corpus: Path, root: Path | ObjectPath, **changes: Any) -> dict[str, Any]:
    """A mix over the corpus at ``root``, with the tokenizer of ``corpus``; output and cache lie in ``folder``."""
    return {
        "output": str(folder / "data"), "cache": str(folder / "cache"), "tokenizer": str(corpus / "tokenizer"),
        "seed": 3, "sequence": {"length": 48}, "holdout": {"fraction": 0.15}, "max_bad": "50%", "shard_size": 2000,
        "unit_size": UNIT_SIZE, "engine": "tokenizers", "sources": sources(root),
    } | changes  # fmt: skip


def chats(kind: str, root: Path | ObjectPath) -> dict[str, Any]:
    """What turns `mix` into one of conversations or pairs."""
    overflow = "truncate" if kind == "sft" else "truncate_prompt"
    return {
        "kind": kind, "chat": {"template": small_datasets.TEMPLATE},
        "sequence": {"length": 200, "overflow": overflow}, "sources": {"one": {"path": f"{root}/{kind}.jsonl"}},
    }  # fmt: skip


def differing(ours: Path, theirs: Path) -> set[str]:
    """Names of files that are not the same in two folders."""
    names = {path.relative_to(root).as_posix() for root in (ours, theirs) for path in root.rglob("*") if path.is_file()}
    return {name for name in names if not _is_same(ours / name, theirs / name)}


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.read_bytes() == other.read_bytes()


def upload_in_parts(server: object_store.Server, path: Path, key: str) -> None:
    """As large files are: its etag is then no MD5."""
    import obstore

    store = obstore.store.from_url(f"s3://{object_store.BUCKET}", client_options={"allow_http": True})
    obstore.put(store, key, path, use_multipart=True)
