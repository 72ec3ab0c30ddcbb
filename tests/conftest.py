"""Settings that every test shares."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The suite states what holds on a CPU, bit for bit; on a machine with a GPU the runs it starts must not use it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Threads that spin while they wait make a busy machine five times slower; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Machines differ in speed; a slow example is not a wrong one. `derandomize` keeps a run repeatable.
settings.register_profile("llmt", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("llmt")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real sample files that may lie beside a checkout; the product does not need it."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "wikitext2-test.txt").exists():
        pytest.skip("the real sample files are not beside this checkout")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A server of the S3 protocol on this machine, with an empty bucket: an `object_store.Server`."""
    import object_store  # loads boto3 and moto

    with object_store.serving() as running:
        yield running


@pytest.fixture
def without_faults(server: Any) -> Iterator[None]:
    """A test sees its own requests alone, and leaves a server that has no faults."""
    server.seen.clear()
    yield
    server.faults = type(server.faults)()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some hundred real documents: the topics of Python's own help, which every machine has."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A byte-level BPE tokenizer of 600 tokens with EOS, in the files that Hugging Face tokenizers have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:40], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Three sources: JSON lines in two files, gzipped JSON lines, plain text files."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "help").mkdir()
    (folder / "help" / "a.jsonl").write_text("".join(lines[:20]))
    (folder / "help" / "b.jsonl").write_text("".join(lines[20:40]))
    (folder / "more.jsonl.gz").write_bytes(gzip.compress("".join(lines[40:60]).encode(), mtime=0))
    (folder / "plain").mkdir()
    for number, text in enumerate(texts[60:70]):
        (folder / "plain" / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture
def mix(tmp_path: Path, corpus_dir: Path, tokenizer_dir: Path) -> dict[str, Any]:
    """A mix over the three sources, as the YAML file would say it."""
    return {
        "output": str(tmp_path / "out" / "data"),
        "tokenizer": str(tokenizer_dir),
        "sequence": {"length": 256},
        "seed": 7,
        "holdout": {"fraction": 0.1},
        "sources": {
            "help": {"path": str(corpus_dir / "help" / "*.jsonl")},
            "more": {"path": str(corpus_dir / "more.jsonl.gz"), "epochs": 2},
            "plain": {"path": str(corpus_dir / "plain")},
        },
    }
