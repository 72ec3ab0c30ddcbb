"""What a run needs, by what it is of."""

from pathlib import Path

import numpy as np
import pytest
import small_datasets
import torch
from train.tiny_dataset import WORDS, write_dataset
from train.tiny_models import CONFIGS

from llmt_shared.dataset import Split, open_dataset
from llmt_train.attention import Machine
from llmt_train.check.estimate import Memory, estimate_memory, fullest_batch, gigabytes
from llmt_train.config import RunConfig
from llmt_train.setup import open_skeleton

LENGTH = 32
KEYS = {**CONFIGS["llama"], "vocab_size": WORDS}
CPU = Machine("cpu")
GPU = Machine("cuda", (9, 0), frozenset({"triton"}))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("estimate") / "data", length=LENGTH)


def config(data: Path, **more) -> RunConfig:
    given = {
        "task": "pretrain",
        "model": {"from_config": {"model_type": "llama", **KEYS}},
        "data": str(data),
        "output": "runs/x",
        "batch": {"tokens": 4 * LENGTH, "micro_rows": 2},
        "train": {"steps": 2},
        "optim": {"lr": 1e-3},
        "precision": "fp32",
    }
    return RunConfig.model_validate(given | more)


def memory(run: RunConfig, machine: Machine = CPU) -> Memory:
    dataset = open_dataset(run.data)
    autocast = torch.bfloat16 if run.precision == "bf16" else None
    skeleton = open_skeleton(run, dataset, machine)
    return estimate_memory(skeleton, run, dataset.train, device_type=machine.device_type, autocast=autocast)


def num_parameters() -> int:
    """Of the tiny Llama, by hand."""
    h, f, V, layers, heads_kv, D = 64, 96, WORDS, 2, 2, 16
    attention = 2 * h * h + 2 * h * heads_kv * D
    return 2 * V * h + layers * (attention + 3 * h * f + 2 * h) + h


def test_weights_gradients_and_state_are_counted_by_parameter(data):
    found = memory(config(data))
    rotary_bytes = 2 * 4 * 8  # the frequencies and their original
    assert found.weights == 4 * num_parameters() + rotary_bytes
    assert found.gradients == 4 * num_parameters()
    assert found.optimizer == pytest.approx(8 * num_parameters(), rel=1e-3)
    assert found.reference == 0
    assert found.total == sum(vars(found).values())


def test_bf16_true_halves_weights_gradients_and_state(data):
    found, in_half = memory(config(data)), memory(config(data, precision="bf16-true"))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(in_half, name) == pytest.approx(getattr(found, name) / 2, rel=1e-2)


def test_bf16_keeps_weights_and_state_and_casts_of_the_layers_weights(data):
    found, mixed = memory(config(data)), memory(config(data, precision="bf16"))
    assert (mixed.weights, mixed.gradients, mixed.optimizer) == (found.weights, found.gradients, found.optimizer)


def test_adapters_alone_have_gradients_and_state(data):
    found = memory(config(data, lora={"rank": 4, "targets": ["q_proj", "down_proj"]}))
    adapters = 2 * (4 * (64 + 64) + 4 * (96 + 64))
    assert found.gradients == 4 * adapters
    assert found.optimizer == pytest.approx(8 * adapters, rel=1e-2)
    assert found.weights == memory(config(data)).weights + 4 * adapters


def test_frozen_parameters_have_neither(data):
    run = config(data, train={"steps": 2, "freeze": ["embed_tokens"]})
    assert memory(run).gradients == 4 * (num_parameters() - WORDS * 64)


def test_the_batch_decides_over_activations_alone(data):
    two, one = memory(config(data)), memory(config(data, batch={"tokens": 4 * LENGTH, "micro_rows": 1}))
    assert two.fixed == one.fixed
    assert two.activations == pytest.approx(2 * one.activations, rel=0.01)


def test_checkpointing_trades_activations_for_work(data):
    policies = ("none", "selective", "attention", "full")
    found = [memory(config(data, train={"steps": 2, "checkpointing": policy})) for policy in policies]
    kept = [each.activations for each in found]
    assert kept == sorted(kept, reverse=True)
    assert found[0].working < found[3].working


def test_every_second_layer_keeps_what_lies_between(data):
    settings = ("none", {"policy": "full", "every": 2}, "full")
    none, half, full = (
        memory(config(data, train={"steps": 2, "checkpointing": each})).activations for each in settings
    )
    assert half == (none + full) // 2


def test_an_update_of_all_parameters_at_once_is_counted_on_a_gpu(data):
    """SGD's is larger than what a tiny batch needs; AdamW's is one kernel that needs nothing."""
    tiny_batch = {"batch": {"tokens": LENGTH, "micro_rows": 1}}
    sgd = memory(config(data, **tiny_batch, optim={"lr": 1e-3, "optimizer": "sgd"}), GPU)
    assert sgd.total >= sgd.fixed + sgd.gradients
    adamw = memory(config(data, **tiny_batch), GPU)
    assert adamw.working == 0


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_datasets.build_chats(tmp_path_factory.mktemp("pairs"), "preference")


def preference(data: Path, task: str, **more) -> RunConfig:
    length = open_dataset(data).train.length
    keys = {key: value for key, value in KEYS.items() if key != "vocab_size"}
    model = {"from_config": {"model_type": "llama", **keys, "max_position_embeddings": length}}
    return config(data, task=task, model=model, batch={"tokens": 2 * length, "micro_rows": 2}, **more)


def test_the_reference_of_dpo_is_a_second_model(pairs):
    found = memory(preference(pairs, "dpo"))
    assert found.reference == found.weights
    for more in ({"dpo": {"reference": "none"}}, {"lora": {"rank": 4}}):
        assert memory(preference(pairs, "dpo", **more)).reference == 0


def test_prompts_that_are_labelled_need_logits_too(pairs):
    response, everything = (
        fullest_batch(open_dataset(pairs).train, preference(pairs, "orpo", orpo={"nll_on": on}))
        for on in ("response", "all")
    )
    assert len(everything.label_places) > len(response.label_places)


def test_the_rows_with_the_most_targets_make_the_batch(data):
    split: Split = open_dataset(data).train
    batch = fullest_batch(split, config(data))
    largest = np.sort(split.row_targets[:])[-2:]
    assert len(batch.label_places) == largest.sum()
    assert batch.input_ids.shape == (1, 2 * LENGTH)


@pytest.mark.parametrize(
    ("size", "text"), [(12_345_678_901, "12.3 GB"), (99_000_000, "99.0 MB"), (1.5e9, "1.5 GB"), (2_100e9, "2,100.0 GB")]
)
def test_sizes_are_read_in_gigabytes(size, text):
    assert gigabytes(size) == text
