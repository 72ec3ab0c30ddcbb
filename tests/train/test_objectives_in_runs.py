"""Real runs over packed files: what they log is what plain transformers makes of the same segments, padded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_datasets
import torch
from train import plain
from train.rows import Row, Segment

from llmt_shared.dataset import Dataset, Split, open_dataset
from llmt_train.config import RunConfig
from llmt_train.data.stream import plan_run, rows_of_step
from llmt_train.fit import fit
from llmt_train.model.load import load_model
from llmt_train.watch.metrics import read_metrics

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "initializer_range": 0.2}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "sft": {"task": "sft", "clm": {"z_loss": 0.01, "label_smoothing": 0.1}},
    "dpo": {"task": "dpo", "dpo": {"loss": "robust", "label_smoothing": 0.2, "beta": 0.5, "sft_weight": 0.5}},
    "dpo without a reference": {
        "task": "dpo",
        "dpo": {"reference": "none", "loss": "ipo", "beta": 0.5, "length_normalised": True},
    },
    "orpo": {"task": "orpo", "orpo": {"beta": 0.5}},
    "orpo, nll on all": {"task": "orpo", "orpo": {"beta": 0.5, "nll_on": "all"}},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    built = {}
    for kind in ("sft", "preference"):
        path = str(folder / kind / "corpus" / f"{kind}.jsonl")
        sources = {"one": {"path": path, "epochs": 2}, "two": {"path": path}}
        built[kind] = small_datasets.build_chats(folder / kind, kind, sources=sources)
    return built


def described(split: Split, numbers: Any) -> list[Row]:
    """Rows of a dataset by their segments."""
    rows = []
    for number in numbers:
        row, pairs = split[number], split.pairs([number])
        borders = row.cu_seqlens[: len(row.segments.length) + 1].tolist()
        segments = []
        for first, last, source in zip(borders, borders[1:], row.segments.source.tolist(), strict=False):
            is_target = np.concatenate([[False], row.labels[first : last - 1] >= 0])
            segments.append(Segment(row.tokens[first:last].astype(np.int64), is_target, source))
        of_row = () if pairs is None else tuple(map(tuple, pairs.segments.tolist()))
        rows.append(Row(tuple(segments), of_row))
    return rows


def fresh_model(config: RunConfig, dataset: Dataset) -> Any:
    """The weights that the run begins with, in transformers' own model."""
    entry = dataset.manifest.tokenizer
    spec = LLAMA | {"vocab_size": entry.max_id + 1, "eos_token_id": entry.eos_id}
    return plain.plain_copy(load_model({"from_config": spec}, seed=config.train.seed))


def measures(config: RunConfig, model: Any, rows: list[Row], *, training: bool) -> dict[str, Any]:
    """By the published formulas."""
    if config.task == "sft":
        return plain.clm_measures(rows, model, **(config.clm.model_dump(exclude={"neftune"}) if training else {}))
    if config.task == "orpo":
        return plain.orpo_measures(plain.sides(rows, model), **config.orpo.model_dump())
    reference = model if config.dpo.reference == "model" else None
    return plain.dpo_measures(plain.sides(rows, model, reference), **config.dpo.model_dump(exclude={"reference"}))


@pytest.mark.parametrize("name", TASKS)
def test_the_first_loss_its_gradient_and_the_first_evaluation(packed, tmp_path, name):
    run = {
        "model": {"from_config": LLAMA}, "output": str(tmp_path / "run"), "train": {"steps": 1},
        "data": str(packed["sft" if name == "sft" else "preference"]), "optim": {"lr": 1e-3},
        "batch": {"tokens": 1000, "micro_rows": 2},
    }  # fmt: skip
    config = RunConfig.model_validate(run | TASKS[name])
    fit(config)
    evaluation, step = read_metrics(tmp_path / "run")[:2]
    dataset = open_dataset(config.data)
    model = fresh_model(config, dataset)

    rows = described(dataset.train, rows_of_step(plan_run(dataset.train, config.batch, config.train), 0))
    wanted = measures(config, model, rows, training=True)
    norm = torch.stack([g.norm() for g in plain.gradients(wanted["loss"], model).values()]).norm().item()
    assert_logged(step, plain.numbers(wanted) | {"grad_norm": norm, "perplexity": wanted["nll"].exp().item()}, name)

    held_out = described(dataset.validation, range(dataset.validation.num_rows))
    assert_logged(evaluation["eval"], plain.numbers(measures(config, model, held_out, training=False)), name)


def assert_logged(record: dict[str, Any], wanted: dict[str, float], name: str) -> None:
    if name == "dpo":
        del wanted["accuracy"]  # policy and reference are equal: rounding decides which side is ahead
    assert {key: record[key] for key in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-5)
