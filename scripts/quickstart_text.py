"""Writes real text that every machine has: Python's sources, docstrings and help topics; trains a tokenizer on it.

usage: python scripts/quickstart_text.py FOLDER_FOR_TEXT FOLDER_FOR_TOKENIZER
"""

import ast
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 2048
EOS = "<|endoftext|>"


def main() -> None:
    raw, tokenizer = map(Path, sys.argv[1:])
    raw.mkdir(parents=True, exist_ok=True)
    sources = list(python_sources())
    write(raw / "code.jsonl", sources)
    write(raw / "docstrings.jsonl", (text for source in sources for text in docstrings(source)))
    write(raw / "prose.jsonl", (topics[name] for name in sorted(topics)))
    if not (tokenizer / "tokenizer.json").exists():
        train_tokenizer(sources[::4] + list(topics.values()), tokenizer)


def python_sources() -> Iterator[str]:
    """The standard library's modules, without its tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not {"test", "tests", "site-packages", "lib2to3", "idlelib"} & set(path.relative_to(library).parts):
            with tokenize.open(path) as file:  # honours the encoding that the file declares
                yield file.read()


def docstrings(source: str) -> Iterator[str]:
    """Docstrings of at least 200 characters."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node) or ""
            if len(text) >= 200:
                yield text


def write(path: Path, texts: Iterable[str]) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in texts if text.strip()]
    content = "".join(lines)
    if not path.exists() or path.read_text() != content:  # an unchanged file need not be tokenized again
        path.write_text(content)
    print(f"{path}: {len(lines)} documents, {len(content) / 1e6:.1f} MB")


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """A byte-level BPE tokenizer, saved as Hugging Face tokenizers are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    print(f"{folder}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
