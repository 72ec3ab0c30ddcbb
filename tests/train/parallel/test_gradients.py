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
    "dp2 tp2 sp": (4, {"dp": 2, "tp": 2}),
    "dp2 tp2": (4, {"dp": 2, "tp": 2, "sp": False}),
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


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name == "dp2 tp2" else name for name in LAYOUTS]
)
def test_a_step_is_that_of_one_process(layout: str, packed: dict[str, Path], alone: list[Taken], tmp_path: Path):
    world, parallel = LAYOUTS[layout]
    names = [f"{family} {task}" for family in FAMILIES for task in TASKS]
    for found in on_ranks(world, take, configs(packed, tmp_path, parallel)):
        assert_equal(names, found, alone)


# Ways to do the same that differ from those above in what is exchanged, and when.
WAYS = {
    "exchanging once a step": (2, {"dp": 2, "no_sync": True}),
    "copies of shards": (4, {"dp": 4, "replicate": 2}),
    "parameters in the host's memory": (2, {"dp": 2, "offload": True}),
    "shared rows and layers": (4, {"cp": 2, "tp": 2}),
}


@pytest.mark.parametrize("way", WAYS)
def test_how_ranks_exchange_changes_nothing(way: str, packed: dict[str, Path], alone: list[Taken], tmp_path: Path):
    world, parallel = WAYS[way]
    chosen = [0, 5, 6]  # pretraining of a Llama, chats and pairs with a Phi-3
    runs = configs(packed, tmp_path, parallel)
    for found in on_ranks(world, take, [runs[index] for index in chosen]):
        assert_equal([str(index) for index in chosen], found, [alone[index] for index in chosen])


_HEADS = {"head_dim": 16}
OTHERS: dict[str, dict[str, Any]] = {
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, a vocabulary that does not divide": {"model_type": "llama", "vocab_size": 1001},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": _HEADS,
    "smollm3": {"pad_token_id": 0},
    "olmo2": {"pad_token_id": 0},
    # A cap that does not saturate: where it does, a gradient is rounding and nothing else.
    "gemma2": {**_HEADS, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def of_families(
    families: dict[str, dict[str, Any]], packed: dict[str, Path], folder: Path, parallel: dict[str, Any]
) -> list[dict[str, Any]]:
    run = configs(packed, folder, parallel)[0]
    run["task"], run["clm"] = "pretrain", {}
    return [run | {"model": {"from_config": _SMALL | {"model_type": name} | keys}} for name, keys in families.items()]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(2, {"tp": 2}), pytest.param(4, {"dp": 2, "tp": 2, "sp": False}, marks=pytest.mark.slow)],
    ids=["tp2 sp", "dp2 tp2"],
)
def test_a_step_of_every_family_with_a_plan(world: int, parallel: dict[str, Any], packed, tmp_path: Path):
    alone = on_ranks(1, take, of_families(OTHERS, packed, tmp_path, {}))[0]
    for found in on_ranks(world, take, of_families(OTHERS, packed, tmp_path, parallel)):
        assert_equal(list(OTHERS), found, alone)


def test_a_step_of_experts_sharded_by_fsdp_alone(packed: dict[str, Path], tmp_path: Path):
    alone = on_ranks(1, take, of_families(EXPERTS, packed, tmp_path, {}))[0]
    for found in on_ranks(2, take, of_families(EXPERTS, packed, tmp_path, {"dp": 2})):
        assert_equal(list(EXPERTS), found, alone)


def assert_equal(names: list[str], found: list[Taken], alone: list[Taken]) -> None:
    for name, got, wanted in zip(names, found, alone, strict=True):
        assert decided(got.measures) == pytest.approx(decided(wanted.measures), rel=TOLERANCE, abs=TOLERANCE), name
        assert got.gradients.keys() == wanted.gradients.keys(), name
        assert gradient_error(got.gradients, wanted.gradients) <= TOLERANCE, name
        assert (got.norm, got.clipped) == pytest.approx((wanted.norm, wanted.clipped), rel=TOLERANCE), name
        evaluation = pytest.approx(decided(wanted.evaluation), rel=TOLERANCE, abs=TOLERANCE)
        assert decided(got.evaluation) == evaluation, name


def decided(measures: dict[str, float]) -> dict[str, float]:
    """Without which side of a pair is ahead: before the first step policy and reference are equal, up to rounding."""
    return {name: value for name, value in measures.items() if "accuracy" not in name}
