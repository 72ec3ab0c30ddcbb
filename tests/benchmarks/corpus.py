"""Writes a corpus of real text that any machine with a Python environment has, and a tokenizer trained on it.

usage: python tests/benchmarks/corpus.py FOLDER MEGABYTES [FOLDER_TO_SEARCH ...]

Sources and documentation of the environment and of the system, one file a document, without duplicates; long files are
cut into documents of at most 200 kB at a line feed, as crawled text is. FOLDER gets `corpus.jsonl` (with an `id`, as
web corpora have) and `tokenizer/`, a byte-level BPE of 32 768 tokens with the regular expression of Llama 3.
"""

import hashlib
import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SUFFIXES = {".py", ".pyi", ".rst", ".md", ".txt", ".html", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".js",
            ".ts", ".pl", ".pm", ".sh", ".cmake", ".f90", ".tcl", ".go", ".rs", ".java", ".xml", ".po"}  # fmt: skip
LONGEST = 200_000
SHORTEST = 100
VOCABULARY = 32_768
TRAINING_BYTES = 30_000_000
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Of Llama 3's tokenizer.json."""


def main() -> None:
    folder, megabytes = Path(sys.argv[1]), float(sys.argv[2])
    folders = sys.argv[3:] or [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"], "/usr"]
    folder.mkdir(parents=True, exist_ok=True)
    texts = write(folder / "corpus.jsonl", documents(folders), int(megabytes * 1e6))
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        train(texts, folder / "tokenizer")


def documents(folders: Iterable[str]) -> Iterator[str]:
    """Distinct texts, file after file in a shuffled order that depends on their names only."""
    paths = sorted({path for folder in folders for path in files(folder)})
    random.Random(0).shuffle(paths)
    seen: set[bytes] = set()
    for path in paths:
        for text in pieces(path):
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                yield text


def files(folder: str) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        for name in names:
            if os.path.splitext(name)[1] in SUFFIXES:
                yield os.path.join(parent, name)


def pieces(path: str) -> Iterator[str]:
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return
    while text:
        end = len(text) if len(text) <= LONGEST else text.rfind("\n", 0, LONGEST) + 1 or LONGEST
        if end >= SHORTEST:
            yield text[:end]
        text = text[end:]


def write(path: Path, texts: Iterable[str], wanted: int) -> list[str]:
    """Write until the file has the wanted size; returns the first documents, to train on."""
    size = number = 0
    kept: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts, 1):
            size += file.write(json.dumps({"id": f"{number:08d}", "text": text}, ensure_ascii=False) + "\n")
            if size < TRAINING_BYTES:
                kept.append(text)
            if size >= wanted:
                break
    print(f"{path}: {number} documents, {path.stat().st_size / 1e6:.1f} MB")
    if size < wanted:
        sys.exit(f"only {size / 1e6:.0f} MB of text found; name more folders to search")
    return kept


def train(texts: list[str], folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": special[0], "eos_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1))


if __name__ == "__main__":
    main()
