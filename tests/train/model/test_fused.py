"""A model whose fused layers are split computes the same to the last bit, and is the same on disk."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train.parallel.shared_out import fuse
from train.tiny_models import CONFIGS, packed, tiny

from llmt_train.model.fused import Rows, disk_names, parts_of, split_fused
from llmt_train.model.liger import Kernels, use_liger
from llmt_train.model.load import load_skeleton
from llmt_train.model.recompute import layers_of

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one head size of its own": {"head_dim": 24},
    "partial rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
}
FIRST = "model.layers.0."
"""q [64, 64], k and v [32, 64] each; gate and up [96, 64] each."""


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    batch = packed([[9, 14, 1]], 24)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments()).logits
    logits.square().sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def pair(**keys: Any) -> tuple[Any, Any]:
    whole = tiny("phi3", initializer_range=0.2, **keys)
    split = copy.deepcopy(whole)
    split_fused(split)
    return whole, split


@pytest.mark.parametrize("shape", SHAPES)
def test_split_and_whole_give_the_same_logits(shape: str):
    whole, split = pair(**SHAPES[shape])
    assert torch.equal(step(split)[0], step(whole)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_split_and_whole_have_the_same_gradients(shape: str):
    """But for rounding: what three layers give their input is three sums then, not one."""
    whole, split = pair(**SHAPES[shape])
    (_, found), (_, wanted) = step(split), step(whole)
    found = fuse(split.config, found)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * gradient.norm().item())


def test_a_split_model_is_the_same_on_disk():
    whole, split = pair()
    assert set(fuse(split.config, split.state_dict())) == set(whole.state_dict())
    for name, tensor in fuse(split.config, split.state_dict()).items():
        assert torch.equal(tensor, whole.state_dict()[name])


def test_every_parameter_is_where_its_rows_say_it_is():
    whole, split = pair()
    on_disk = whole.state_dict()
    for name, parameter in split.named_parameters():
        rows = parts_of(split.config, name)
        stored = on_disk[name] if rows is None else on_disk[rows.name][rows.first : rows.last]
        assert torch.equal(parameter, stored)


@pytest.mark.parametrize(
    ("part", "fused", "first", "last"),
    [
        ("self_attn.q_proj", "self_attn.qkv_proj", 0, 64),
        ("self_attn.k_proj", "self_attn.qkv_proj", 64, 96),
        ("self_attn.v_proj", "self_attn.qkv_proj", 96, 128),
        ("mlp.gate_proj", "mlp.gate_up_proj", 0, 96),
        ("mlp.up_proj", "mlp.gate_up_proj", 96, 192),
    ],
)
def test_rows_of_the_parts(part: str, fused: str, first: int, last: int):
    config = tiny("phi3").config
    assert parts_of(config, f"{FIRST}{part}.weight") == Rows(f"{FIRST}{fused}.weight", first, last)


@pytest.mark.parametrize("name", [f"{FIRST}self_attn.o_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_what_is_no_part_is_itself(name: str):
    assert parts_of(tiny("phi3").config, name) is None


def test_parts_are_in_the_order_of_their_rows_however_they_come():
    names = [f"{FIRST}mlp.up_proj.weight", "lm_head.weight", f"{FIRST}mlp.gate_proj.weight"]
    groups = disk_names(tiny("phi3").config, names)
    assert groups == {f"{FIRST}mlp.gate_up_proj.weight": [names[2], names[0]], "lm_head.weight": [names[1]]}


def test_other_families_have_nothing_to_split():
    model = tiny("llama")
    before = list(model.state_dict())
    assert split_fused(model) == 0
    assert list(fuse(model.config, model.state_dict())) == before
    assert parts_of(model.config, f"{FIRST}self_attn.q_proj.weight") is None


def test_splitting_again_changes_nothing():
    _, split = pair()
    names = [name for name, _ in split.named_parameters()]
    assert split_fused(split) == 0
    assert [name for name, _ in split.named_parameters()] == names


def test_a_model_without_weights_is_split_too():
    skeleton = load_skeleton({"from_config": {"model_type": "phi3", **CONFIGS["phi3"]}})
    assert split_fused(skeleton) == 4  # two in each layer
    _, split = pair()
    assert {name: p.shape for name, p in skeleton.named_parameters()} == {
        n: p.shape for n, p in split.named_parameters()
    }
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_a_copy_of_a_split_model_computes_with_weights_of_its_own():
    _, split = pair()
    twin, wanted = copy.deepcopy(split), step(split)[0]
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.zero_()
    assert torch.equal(step(twin)[0], wanted)


def test_frozen_layers_have_frozen_parts():
    model = tiny("phi3")
    model.model.layers[0].self_attn.qkv_proj.requires_grad_(False)
    split_fused(model)
    attention = model.model.layers[0].self_attn
    assert not any(p.requires_grad for p in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
    assert attention.o_proj.weight.requires_grad


def test_parts_do_not_keep_the_fused_weights_alive():
    _, split = pair()
    for parameter in split.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_fused_kernels_find_the_parts():
    """Liger's MLP takes gate and up as they are, so nothing is laid side by side for it."""
    whole, split = pair()
    kernels = Kernels(_rms_norm, lambda a, b: nn.functional.silu(a) * b, lambda a, b: nn.functional.gelu(a) * b)
    assert use_liger(split, kernels) == use_liger(whole, kernels) == 7  # two norms and an MLP each, and the last norm
    assert all(not hasattr(layer.mlp, "gate_up_proj") for layer in layers_of(split, ""))
    torch.testing.assert_close(step(split)[0], step(whole)[0], rtol=0, atol=1e-5)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
    del casting
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)
