"""A run is trained, resumed on other layouts and exported as if it had been on one process all the time."""

from pathlib import Path
from typing import Any

import pytest
from train.parallel.ranks import on_ranks
from train.parallel.test_gradients import EXPERTS, OTHERS
from train.tiny_dataset import WORDS, write_dataset

from llmt_train.checkpoints.folders import find_checkpoint
from llmt_train.checkpoints.sharded import read_index
from llmt_train.config import RunConfig
from llmt_train.export import export
from llmt_train.fit import fit
from llmt_train.validate import validate
from llmt_train.watch.metrics import read_metrics

_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 64}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama", **_SMALL, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", **_SMALL, "pad_token_id": 0},
}
WHOLE = 12
LAYOUTS = [(4, {"dp": 2, "tp": 2}, 4), (2, {"dp": 2}, 7), (2, {"tp": 2}, 10), (1, {}, WHOLE)]
"""Ranks, layout, and the step that they train to."""


def train(run: dict[str, Any], steps: int, parallel: dict[str, Any]) -> None:
    fit(RunConfig.model_validate(run | {"train": {"steps": steps, "seed": 1}, "parallel": parallel}))


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(output) if "loss" in record]


@pytest.mark.parametrize(
    ("family", "asynchronous"), [("llama", True), pytest.param("phi3", False, marks=pytest.mark.slow)]
)
def test_a_run_goes_from_layout_to_layout(tmp_path: Path, family: str, asynchronous: bool) -> None:
    run = {
        "task": "pretrain", "model": {"from_config": FAMILIES[family]}, "batch": {"tokens": 96, "micro_rows": 1},
        "data": str(write_dataset(tmp_path / "data", num_rows=30)), "output": str(tmp_path / "run"),
        "optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0}, "eval": {"every": 4},
        "save": {"every": 2, "keep": 2, "asynchronous": asynchronous},
    }  # fmt: skip
    for world, parallel, steps in LAYOUTS:
        on_ranks(world, train, run, steps, parallel)
    train(run | {"output": str(tmp_path / "whole")}, WHOLE, {})
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    names = [read_index(find_checkpoint(tmp_path / of) / "tensors").tensors.keys() for of in ("run", "whole")]
    assert names[0] == names[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_two_by_two_ranks_saved_is_exported_and_validated(tmp_path: Path, family: str) -> None:
    run = {
        "task": "pretrain", "model": {"from_config": FAMILIES[family]}, "batch": {"tokens": 96, "micro_rows": 1},
        "data": str(write_dataset(tmp_path / "data", num_rows=30)), "output": str(tmp_path / "run"),
        "optim": {"lr": 1e-2}, "eval": {"every": 2},
    }  # fmt: skip
    on_ranks(4, train, run, 2, {"dp": 2, "tp": 2})
    files = sorted(path.name for path in (find_checkpoint(tmp_path / "run") / "tensors").glob("*.distcp"))
    assert files == [f"__{rank}_0.distcp" for rank in range(4)]
    assert export(tmp_path / "run", tmp_path / "model", check=True).largest_difference <= 1e-5
    saved = [record["eval"] for record in read_metrics(tmp_path / "run") if "eval" in record][-1]
    found = validate(tmp_path / "run", ["parallel.dp=1", "parallel.tp=1"]).eval
    assert found["loss"] == pytest.approx(saved["loss"], rel=1e-5)


def train_all(runs: list[dict[str, Any]], parallel: dict[str, Any]) -> None:
    for run in runs:
        train(run, 1, parallel)


@pytest.mark.slow
@pytest.mark.parametrize(("families", "parallel"), [(OTHERS, {"dp": 2, "tp": 2}), (EXPERTS, {"dp": 4})])
def test_every_family_is_exported_from_what_four_ranks_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, families: dict[str, dict[str, Any]], parallel: dict[str, Any]
) -> None:
    """As plain transformers computes with it, see `export.TOLERANCE`."""
    # Some families have rules for tokenizers, which the one of these tests, of whole words, does not follow.
    monkeypatch.setattr("llmt_train.export._tokenizer_mistake", lambda folder: None)
    data = str(write_dataset(tmp_path / "data", num_rows=30))
    runs = [
        {
            "task": "pretrain", "model": {"from_config": _SMALL | {"model_type": name} | keys}, "data": data,
            "batch": {"tokens": 96, "micro_rows": 1}, "output": str(tmp_path / name), "optim": {"lr": 1e-2},
        }
        for name, keys in families.items()
    ]  # fmt: skip
    on_ranks(4, train_all, runs, parallel)
    for name in families:
        assert export(tmp_path / name, tmp_path / "models" / name, check=True).largest_difference <= 1e-5, name
