"""Counted arithmetic against torch's own counter, and against what is counted by hand."""

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode
from train.tiny_models import CONFIGS, packed, tiny

from llmt_train.model.flops import ModelFlops, model_flops, peak_flops, step_flops
from llmt_train.model.load import load_skeleton


def counted(model) -> int:
    """Of a forward and backward pass over 32 tokens, attention left out: torch does not count the CPU's."""
    batch = packed([[32]], 32)
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments())
        output.logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_matrix_products_are_those_that_torch_counts(family, tied):
    model = tiny(family, tie_word_embeddings=tied)
    assert 32 * model_flops(model).per_token == counted(model)


def test_a_frozen_matrix_needs_no_gradient():
    model = tiny("llama", tie_word_embeddings=False)
    for layer in model.model.layers:
        layer.mlp.requires_grad_(False)
    assert 32 * model_flops(model).per_token == counted(model)


def test_the_meta_device_serves():
    skeleton = load_skeleton({"from_config": {"model_type": "llama", **CONFIGS["llama"]}})
    assert model_flops(skeleton) == model_flops(tiny("llama"))


def test_a_query_sees_the_keys_before_it_and_itself():
    """Two segments of 3 and 1 tokens: 1 + 2 + 3 + 1 pairs."""
    assert step_flops(ModelFlops(10.0, 100.0), np.array([3, 1])) == 4 * 10.0 + 7 * 100.0


def test_a_pair_costs_two_products_of_a_head_three_times_over():
    """Scores and values, 2 D each, in every head and layer; the backward pass is twice the forward pass."""
    assert model_flops(tiny("llama")).per_key == 3 * (2 + 2) * 16 * 4 * 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("Radeon", None),
    ],
)
def test_peaks_are_found_by_name(name, peak):
    assert peak_flops(name) == peak
