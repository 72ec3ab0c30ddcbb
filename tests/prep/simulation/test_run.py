"""What is foreseen from a sample against what a real run makes of the whole; times are never asserted."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_tokenizers
from small_datasets import TEMPLATE, write_chats

from llmt_prep.config import MixConfig
from llmt_prep.pipeline import build_dataset, simulate
from llmt_prep.shards import num_shards, rows_per_shard
from llmt_prep.simulation import Simulation, parse_scenario
from llmt_prep.simulation.render import render
from llmt_shared.errors import ConfigError, DataError
from llmt_shared.manifest import read_manifest

LENGTH = 256


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """3 MB: JSON lines in three files and Parquet in one; documents of the lines of Python's help, dealt out anew."""
    folder = tmp_path_factory.mktemp("raw")
    random = np.random.default_rng(7)
    lines = [line for text in texts for line in text.splitlines(keepends=True)]

    def document(mean: float) -> str:
        count = max(1, int(random.lognormal(mean, 0.9)))
        return "".join(lines[int(place)] for place in random.integers(0, len(lines), count))

    (folder / "web").mkdir()
    for number in range(3):
        documents = [json.dumps({"text": document(2.2)}) + "\n" for _ in range(1200)]
        (folder / "web" / f"{number}.jsonl").write_text("".join(documents), "utf-8")
    table = pa.table({"text": [document(3.0) for _ in range(900)]})
    pq.write_table(table, folder / "code.parquet", row_group_size=30)
    return folder


@pytest.fixture
def mix(raw: Path, tokenizer_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "output": str(tmp_path / "data"), "cache": str(tmp_path / "cache"), "tokenizer": str(tokenizer_dir),
        "sequence": {"length": LENGTH}, "holdout": {"fraction": 0.02}, "unit_size": 60_000, "shard_size": 200_000,
        "budget": "max", "max_epochs": 2, "workers": 1,
        "sources": {
            "web": {"path": str(raw / "web"), "weight": 3},
            "code": {"path": str(raw / "code.parquet"), "weight": 1},
        },
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of temporary files that must be empty afterwards."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not list(folder.iterdir())


def simulated(mix: dict[str, Any], asked: str, workers: int = 1) -> Simulation:
    return simulate(MixConfig.model_validate(mix), parse_scenario(asked), workers=workers)


def size(path: Path, pattern: str = "*") -> int:
    return sum(file.stat().st_size for file in path.rglob(pattern) if file.is_file())


def test_rows_and_disk_of_a_corpus_are_foreseen_from_a_sixth_of_it(mix: dict[str, Any], tmp_path: Path) -> None:
    found = simulated(mix, "sample=250kB")
    assert found.measured.sources["web"].sampled_bytes < found.measured.sources["web"].bytes / 4
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "data").exists()
    built = build_dataset(MixConfig.model_validate(mix))
    forecast, real = found.forecast, built.manifest.splits
    assert forecast.splits["train"].rows == pytest.approx(real["train"].rows, rel=0.04)
    assert forecast.splits["train"].segments == pytest.approx(real["train"].segments, rel=0.04)
    assert forecast.splits["validation"].rows == pytest.approx(real["validation"].rows, rel=0.5)  # of 90 documents
    assert forecast.disk.dataset == pytest.approx(size(built.path), rel=0.04)
    assert forecast.disk.cache == pytest.approx(size(tmp_path / "cache"), rel=0.04)
    shares = {name: source.share for name, source in forecast.sources.items()}
    assert shares == pytest.approx({"web": 0.75, "code": 0.25}, rel=1e-3)


def test_of_a_corpus_that_is_sampled_whole_rows_and_files_are_exact(mix: dict[str, Any], tmp_path: Path) -> None:
    mix |= {"holdout": {"fraction": 0}, "budget": None, "sources": {"code": {"path": mix["sources"]["code"]["path"]}}}
    found = simulated(mix, "sample=1GB").forecast
    built = build_dataset(MixConfig.model_validate(mix))
    real = built.manifest.splits["train"]
    assert (found.splits["train"].rows, found.splits["train"].segments) == (real.rows, real.segments)
    assert found.splits["train"].tokens == real.tokens
    per_shard = rows_per_shard(real.rows, LENGTH, 2, mix["shard_size"])
    assert found.splits["train"].shards == num_shards(real.rows, per_shard)
    chunks = sum(size(folder) for folder in built.path.glob("train/*/c"))
    assert found.splits["train"].disk == chunks
    units = sum(size(folder) for folder in (tmp_path / "cache").glob("units/*"))
    tokenizer = sum(size(folder) for folder in (tmp_path / "cache").glob("tokenizers/*"))
    assert found.disk.cache == pytest.approx(units + tokenizer, rel=1e-4)  # units name the run's own folders


@pytest.mark.parametrize(
    ("kind", "overflow"),
    [
        ("sft", "drop"),
        pytest.param("preference", "drop", marks=pytest.mark.slow),
        ("preference", "truncate_prompt"),
    ],
)
def test_chats_and_pairs_are_foreseen_too(kind: str, overflow: str, tmp_path: Path) -> None:
    corpus = write_chats(tmp_path / "corpus")
    saved = small_tokenizers.save(
        small_tokenizers.byte_level_bpe(), tmp_path / "tokenizer", eos_token=small_tokenizers.EOT
    )
    mix: dict[str, Any] = {
        "kind": kind, "output": tmp_path / "data", "tokenizer": str(saved), "chat": {"template": TEMPLATE},
        "sequence": {"length": 200, "overflow": overflow}, "shard_size": 4000, "unit_size": 3000, "workers": 1,
        "sources": {"one": {"path": str(corpus / f"{kind}.jsonl"), "epochs": 2}},
    }  # fmt: skip
    found = simulated(mix, "sample=1GB").forecast
    built = build_dataset(MixConfig.model_validate(mix))
    real = built.manifest.splits["train"]
    assert found.splits["train"].tokens == real.tokens
    assert found.splits["train"].segments == real.segments
    assert found.splits["train"].rows == pytest.approx(real.rows, abs=1)
    assert found.disk.dataset == pytest.approx(size(built.path), rel=0.02)


@pytest.mark.slow
def test_a_corpus_a_million_times_as_large_is_answered_in_seconds(mix: dict[str, Any]) -> None:
    found = simulated(mix, "documents=1e10,machines=64,cores=32,disk=2GB/s,sample=250kB", workers=2)
    assert sum(source.documents for source in found.forecast.sources.values()) == pytest.approx(10**10, rel=1e-6)
    assert found.forecast.splits["train"].fill > 0.99
    assert found.measured.rates.workers == 2
    assert found.forecast.cluster.workers == 64 * 32
    text = render(found)
    assert text.index("MEASURED HERE") < text.index("EXTRAPOLATED") < text.index("in all")
    assert "larger `unit_size`" in text


def test_the_text_says_what_was_scaled_and_the_json_says_it_all(mix: dict[str, Any]) -> None:
    found = simulated(mix | {"budget": 1_000_000}, "bytes=1GB,sample=250kB")
    assert "scaled by the same factor: budget" in render(found)
    assert Simulation.model_validate_json(found.model_dump_json()).forecast == found.forecast


def test_a_mix_that_cannot_be_packed_cannot_be_simulated(mix: dict[str, Any], raw: Path) -> None:
    with pytest.raises(ConfigError, match="largest feasible budget"):
        simulated(mix | {"budget": 10**9}, "sample=250kB")
    with pytest.raises(DataError, match="a row has 256"):
        simulated(mix | {"sequence": {"length": LENGTH, "overflow": "error"}}, "sample=250kB")
    (raw / "bad").mkdir(exist_ok=True)
    (raw / "bad" / "bad.jsonl").write_text('{"txt": "no such field"}\n' * 200)
    with pytest.raises(DataError, match="no field 'text'"):
        simulated(mix | {"budget": None, "sources": {"bad": {"path": str(raw / "bad")}}}, "")


def test_the_output_and_the_cache_of_another_run_are_left_alone(mix: dict[str, Any], tmp_path: Path) -> None:
    built = build_dataset(MixConfig.model_validate(mix))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    simulated(mix, "sample=250kB")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "temporary"} == {
        path: time for path, time in before.items() if path.name != "temporary"
    }
    assert read_manifest(built.path)[1] == built.digest
