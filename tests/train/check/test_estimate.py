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
from llmt_train.check.estimate import Memory, _fullest_rank, estimate_memory, fullest_batch, gigabytes
from llmt_train.config import RunConfig
from llmt_train.parallel.layout import Layout
from llmt_train.setup import open_skeleton

LENGTH = 32
KEYS = {**CONFIGS["llama"], "vocab_size": WORDS}
ONE = Layout()
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


def memory(run: RunConfig, machine: Machine = CPU, layout: Layout = ONE) -> Memory:
    dataset = open_dataset(run.data)
    compute = torch.bfloat16 if run.precision == "bf16" else None
    skeleton = open_skeleton(run, dataset, machine)
    device_type = machine.device_type
    return estimate_memory(skeleton, run, dataset.train, device_type=device_type, compute=compute, layout=layout)


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
    assert (found.reference, found.host) == (0, 0)
    assert found.total == sum(vars(found).values())


def test_bf16_true_halves_weights_gradients_and_state(data):
    found, in_half = memory(config(data)), memory(config(data, precision="bf16-true"))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(in_half, name) == pytest.approx(getattr(found, name) / 2, rel=1e-2)


def test_bf16_keeps_weights_and_state_and_halves_what_is_whole(data):
    found, mixed = memory(config(data)), memory(config(data, precision="bf16"))
    assert (mixed.weights, mixed.gradients, mixed.optimizer) == (found.weights, found.gradients, found.optimizer)
    for name in ("activations", "exchanged"):
        assert 0.4 < getattr(mixed, name) / getattr(found, name) < 0.7


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
    """SGD's is larger than what a tiny batch needs of a large model; AdamW's is one kernel that needs nothing."""
    keys = KEYS | {"num_hidden_layers": 12, "intermediate_size": 512}
    large = {"model": {"from_config": {"model_type": "llama", **keys}}, "batch": {"tokens": LENGTH}}
    sgd = memory(config(data, **large, optim={"lr": 1e-3, "optimizer": "sgd"}), GPU)
    assert sgd.total == sgd.fixed + sgd.gradients
    adamw = memory(config(data, **large), GPU)
    assert adamw.total < adamw.fixed + adamw.gradients


@pytest.mark.parametrize(
    ("layout", "parts"), [(Layout(shard=2), 2), (Layout(replicate=2, shard=2), 2), (Layout(shard=2, cp=2), 4)]
)
def test_devices_share_weights_gradients_and_state(data, layout, parts):
    found = memory(config(data), layout=layout)
    rotary_bytes = 2 * 4 * 8
    assert found.weights - rotary_bytes == pytest.approx(4 * num_parameters() / parts, rel=0.01)
    assert found.gradients == found.weights - rotary_bytes
    assert found.optimizer == pytest.approx(2 * found.gradients, rel=0.01)


def test_devices_of_cp_and_tp_share_activations(data):
    one = memory(config(data)).activations
    assert memory(config(data, parallel={"cp": 2}), layout=Layout(cp=2)).activations == pytest.approx(one / 2, rel=0.01)
    shared, split = (
        memory(config(data, parallel={"tp": 2, "sp": sp}), layout=Layout(tp=2)).activations for sp in (False, True)
    )
    assert 0.5 * one < split < shared < one


def test_a_step_of_few_rows_leaves_each_device_few(data):
    """Two rows fit, but four devices share the four rows of a step."""
    two, one = (memory(config(data), layout=Layout(shard=devices)).activations for devices in (2, 4))
    assert one == pytest.approx(two / 2, rel=0.01)


def test_of_devices_that_share_rows_the_one_with_the_most_labels_counts(pairs):
    run = preference(pairs, "orpo", parallel={"cp": 2})
    length, batch = open_dataset(pairs).train.length, fullest_batch(open_dataset(pairs).train, run, 2)
    halves = [int((batch.label_places // length == half).sum()) for half in (0, 1)]
    assert max(halves) != min(halves)
    assert _fullest_rank(batch, Layout(cp=2)) == halves.index(max(halves))


def test_offload_moves_what_stays_from_step_to_step_to_the_host(data):
    here = memory(config(data), GPU)
    there = memory(config(data, parallel={"offload": True}), GPU)
    rotary_bytes = 2 * 4 * 8
    assert (there.weights, there.gradients, there.optimizer) == (rotary_bytes, 0, 0)
    assert there.host >= here.fixed - rotary_bytes
    a_layer = 2 * 64 * 64 + 2 * 64 * 2 * 16 + 3 * 64 * 96 + 2 * 64  # its parts come in their own dtype
    assert there.exchanged == here.exchanged + 4 * a_layer
    assert memory(config(data, parallel={"offload": True})) == memory(config(data))  # a CPU is its own host


def test_gradients_that_are_exchanged_once_a_step_are_whole(data):
    run = config(data, parallel={"no_sync": True})
    assert memory(run, layout=Layout(shard=4)).gradients == num_parameters()  # one micro-batch: nothing waits
    run = config(data, parallel={"no_sync": True}, batch={"tokens": 16 * LENGTH, "micro_rows": 2}, precision="bf16")
    assert memory(run, layout=Layout(shard=4)).gradients == 4 * num_parameters()


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
        fullest_batch(open_dataset(pairs).train, preference(pairs, "orpo", orpo={"nll_on": on}), 2)
        for on in ("response", "all")
    )
    assert len(everything.label_places) > len(response.label_places)


def test_the_rows_with_the_most_targets_make_the_batch(data):
    split: Split = open_dataset(data).train
    batch = fullest_batch(split, config(data), 2)
    largest = np.sort(split.row_targets[:])[-2:]
    assert len(batch.label_places) == largest.sum()
    assert batch.input_ids.shape == (1, 2 * LENGTH)


@pytest.mark.parametrize(
    ("size", "text"), [(12_345_678_901, "12.3 GB"), (99_000_000, "99.0 MB"), (1.5e9, "1.5 GB"), (2_100e9, "2,100.0 GB")]
)
def test_sizes_are_read_in_gigabytes(size, text):
    assert gigabytes(size) == text
