"""Whatever the layout, a step's loss, gradient and norm, and an evaluation, are those of one process."""

from pathlib import Path
from typing import Any

import pytest
import small_datasets
from train.parallel.first_step import Taken, take
from train.parallel.ranks import on_ranks
from train.steps import gradient_error

TOLERANCE = 1e-5
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 1000, "initializer_range": 0.2}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama", **_SMALL},
    "phi3": {"model_type": "phi3", **_SMALL, "pad_token_id": 0},
}
TASKS: dict[str, dict[str, Any]] = {
    "pretrain": {"task": "pretrain", "clm": {"z_loss": 0.01, "label_smoothing": 0.1}},
    "sft": {"task": "sft", "clm": {"neftune": 5.0}},
    "dpo": {"task": "dpo", "dpo": {"loss": "robust", "label_smoothing": 0.2, "beta": 0.5, "sft_weight": 0.5}},
    "orpo": {"task": "orpo", "orpo": {"beta": 0.5, "nll_on": "all"}},
}
KINDS = {"pretrain": "pretrain", "sft": "sft", "dpo": "preference", "orpo": "preference"}
LAYOUTS = {
    "dp2": (2, {"dp": 2}),
    "tp2": (2, {"tp": 2, "sp": False}),
    "tp2 sp": (2, {"tp": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2 tp2": (4, {"dp": 2, "tp": 2}),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    built = {"pretrain": small_datasets.build(folder / "pretrain")}
    for kind in ("sft", "preference"):
        path = str(folder / kind / "corpus" / f"{kind}.jsonl")
        sources = {"one": {"path": path, "epochs": 2}, "two": {"path": path}}
        built[kind] = small_datasets.build_chats(folder / kind, kind, sources=sources)
    return built


def configs(packed: dict[str, Path], folder: Path, parallel: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "model": {"from_config": family},
            "output": str(folder / "run"),
            "train": {"steps": 2},
            "data": str(packed[KINDS[task["task"]]]),
            "optim": {"lr": 1e-3},
            "parallel": parallel,
            "batch": {"tokens": 1200, "micro_rows": 2},
            **task,
        }
        for family in FAMILIES.values()
        for task in TASKS.values()
    ]


@pytest.fixture(scope="module")
def alone(packed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Taken]:
    return on_ranks(1, take, configs(packed, tmp_path_factory.mktemp("alone"), {}))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_one_process(layout: str, packed: dict[str, Path], alone: list[Taken], tmp_path: Path):
    world, parallel = LAYOUTS[layout]
    names = [f"{family} {task}" for family in FAMILIES for task in TASKS]
    for found in on_ranks(world, take, configs(packed, tmp_path, parallel)):
        for name, got, wanted in zip(names, found, alone, strict=True):
            assert decided(got.measures) == pytest.approx(decided(wanted.measures), rel=TOLERANCE, abs=TOLERANCE), name
            assert got.gradients.keys() == wanted.gradients.keys()
            assert gradient_error(got.gradients, wanted.gradients) <= TOLERANCE, name
            assert (got.norm, got.clipped) == pytest.approx((wanted.norm, wanted.clipped), rel=TOLERANCE), name
            assert decided(got.evaluation) == pytest.approx(decided(wanted.evaluation), rel=TOLERANCE, abs=TOLERANCE)


def decided(measures: dict[str, float]) -> dict[str, float]:
    """Without which side of a pair is ahead: before the first step policy and reference are equal, up to rounding."""
    return {name: value for name, value in measures.items() if "accuracy" not in name}
