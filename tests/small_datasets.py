"""Small finished datasets to look at and to damage: three readers, odd texts, split documents, something held out."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import small_tokenizers
import zarr
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmt_prep import arrays
from llmt_prep.config import MixConfig
from llmt_prep.pipeline import build_dataset

LENGTH = 48
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|endoftext|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template with marks around what the assistant writes."""
NASTY = "\x1b[31mred\x9b0m \u202e\x07 naïve 🙂 日本語 <|endoftext|> "


def write_corpus(folder: Path) -> Path:
    """JSON lines with empty and broken records, Parquet, and text by lines."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(5)
    words = " ".join(small_tokenizers.CORPUS).split(" ")
    texts = [" ".join(random.choice(words, int(random.integers(1, 60)))) for _ in range(90)]
    lines = [json.dumps({"text": text}) for text in texts[:50]]
    lines[3], lines[7], lines[11] = json.dumps({"text": ""}), "{broken", json.dumps({"text": NASTY * 4})
    (folder / "web.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    pq.write_table(pa.table({"text": texts[50:75]}), folder / "code.parquet")
    (folder / "notes.txt").write_text("\n".join(" ".join(text.split()) for text in texts[75:]) + "\n", "utf-8")
    return folder


def build(folder: Path, tokenizer: Tokenizer | None = None, **changes: Any) -> Path:
    """Pack the corpus of `write_corpus`; ``changes`` are keys of the mix."""
    corpus = write_corpus(folder / "corpus")
    chosen = tokenizer or small_tokenizers.byte_level_bpe()
    named = {"eos_token": small_tokenizers.EOT}
    if chosen.token_to_id("<|begin|>") is not None:
        named["bos_token"] = "<|begin|>"
    saved = small_tokenizers.save(chosen, folder / "tokenizer", **named)
    mix = {
        "output": folder / "data", "tokenizer": str(saved), "sequence": {"length": LENGTH}, "seed": 3,
        "holdout": {"fraction": 0.15}, "max_bad": "50%", "shard_size": 2000, "workers": 1,
        "budget": 5000, "max_epochs": 9,
        "sources": {
            "web": {"path": str(corpus / "web.jsonl"), "weight": 3},
            "code": {"path": str(corpus / "code.parquet"), "weight": 1},
            "notes": {"path": str(corpus / "notes.txt"), "record": "line", "epochs": 1},
        },
    }  # fmt: skip
    return build_dataset(MixConfig.model_validate(mix | changes), workers=1).path


def write_chats(folder: Path) -> Path:
    """JSON lines: conversations of up to three turns, and pairs of two answers to one conversation."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(6)
    words = " ".join(small_tokenizers.CORPUS).split(" ")

    def said(role: str, longest: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(random.choice(words, int(random.integers(1, longest))))}

    chats = [
        [said(role, 12) for _ in range(int(random.integers(1, 4))) for role in ("user", "assistant")] for _ in range(60)
    ]
    pairs = [
        {"chosen": [*chat[:-1], said("assistant", 8)], "rejected": [*chat[:-1], said("assistant", 8)]} for chat in chats
    ]
    for name, records in (("sft", [{"messages": chat} for chat in chats]), ("preference", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return folder


def build_chats(folder: Path, kind: str, **changes: Any) -> Path:
    """Pack what `write_chats` writes, twice over; ``changes`` are keys of the mix."""
    corpus = write_chats(folder / "corpus")
    saved = small_tokenizers.save(
        small_tokenizers.byte_level_bpe(), folder / "tokenizer", eos_token=small_tokenizers.EOT
    )
    mix: dict[str, Any] = {
        "kind": kind, "output": folder / "data", "tokenizer": str(saved), "chat": {"template": TEMPLATE}, "seed": 3,
        "sequence": {"length": 200, "overflow": "truncate" if kind == "sft" else "truncate_prompt"},
        "holdout": {"fraction": 0.15}, "shard_size": 4000, "workers": 1,
        "sources": {"one": {"path": str(corpus / f"{kind}.jsonl"), "epochs": 2}},
    }  # fmt: skip
    return build_dataset(MixConfig.model_validate(mix | changes)).path


def build_kind(folder: Path, kind: str) -> Path:
    """Pack a small dataset of any kind."""
    return build(folder) if kind == "pretrain" else build_chats(folder, kind)


def copy(dataset: Path, target: Path) -> Path:
    """Copy a dataset that is to be damaged."""
    return Path(shutil.copytree(dataset, target))


def reseal(dataset: Path, **header: Any) -> None:
    """Make the manifest right again, so that only what the files say can be wrong; ``header`` replaces its keys."""
    path = dataset / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    files = sorted(each for each in dataset.rglob("*") if each.is_file() and each.name not in (path.name, "run.json"))
    manifest["files"] = [
        {
            "path": each.relative_to(dataset).as_posix(),
            "bytes": each.stat().st_size,
            "sha256": hashlib.sha256(each.read_bytes()).hexdigest(),
        }
        for each in files
    ]
    path.write_text(json.dumps(manifest | header))


def rewrite(dataset: Path, name: str, change: Callable[[NDArray[Any]], NDArray[Any] | None]) -> None:
    """Replace one array, such as ``train/tokens``, by what a function makes of it, with sound chunks and manifest."""
    stored = zarr.open_group(dataset, mode="r")[name]
    values, chunks = stored[:], stored.chunks
    changed = change(values)
    values = values if changed is None else changed
    shutil.rmtree(dataset / name)
    if values.ndim == 1:
        arrays.write_column(dataset / name, [values], len(values), values.dtype.name)
    else:
        arrays.write_metadata(dataset / name, values.shape, chunks, values.dtype)
        for chunk, start in enumerate(range(0, len(values), chunks[0])):
            whole = np.zeros(chunks, values.dtype)
            part = values[start : start + chunks[0]]
            whole[: len(part)] = part
            arrays.write_chunk(dataset / name / "c" / str(chunk) / "0", whole)
    reseal(dataset)
