"""What is computed again gives the same gradients, and less is kept; every policy does what its name says."""

import copy
import weakref

import pytest
import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from train.tiny_models import packed, tiny

from llmt_shared.errors import ConfigError
from llmt_train.config import CheckpointingConfig
from llmt_train.model.recompute import layers_of, recompute

POLICIES = ["none", "selective", "attention", "full"]
"""From the most to the least that is kept."""
BATCH = [[40, 24], [64]]


def made(family, policy, every=1, **keys):
    model = tiny(family, **keys)
    recompute(model, CheckpointingConfig(policy=policy, every=every))
    return model


def backward(model, seed=0):
    """Loss and gradients of one micro-batch; dropout is drawn from the seed."""
    batch = packed(BATCH, 64)
    torch.manual_seed(seed)
    output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments())
    loss = torch.nn.functional.cross_entropy(output.logits[0], batch.labels[0])
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize(("family", "keys"), [("llama", {}), ("gemma2", {}), ("gpt2", DROPOUT), ("phi3", {})])
def test_loss_and_gradients_are_the_same_bits(family, keys, policy):
    loss, gradients = backward(made(family, "none", **keys))
    found, recomputed = backward(made(family, policy, **keys))
    assert torch.equal(found, loss)
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name


class Kept(TorchDispatchMode):
    """Bytes of the storages that live on, of all that operations have made."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        for tensor in _pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return output

    def total(self):
        return sum(size for storage, size in self.storages.values() if storage() is not None)


def kept_and_computed(model):
    """Bytes kept after a forward pass, and the floating point operations of both passes."""
    batch = packed(BATCH, 64)
    with Kept() as kept, FlopCounterMode(display=False) as counter:
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments())
        loss, size = output.logits.sum(), kept.total()
        loss.backward()
    return size, counter.get_total_flops()


def test_each_policy_keeps_less_and_computes_more_than_the_one_before():
    results = [kept_and_computed(made("llama", policy)) for policy in POLICIES]
    sizes, flops = zip(*results, strict=True)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(POLICIES)
    assert sizes[-1] < 0.4 * sizes[0]
    assert list(flops) == sorted(flops)
    assert flops[0] < flops[1] < flops[2]


def test_full_computes_every_layer_once_more_up_to_what_the_backward_pass_needs():
    """The last product of a layer is no input of anything in it."""
    model = made("llama", "none")
    forward = FlopCounterMode(display=False)
    batch = packed(BATCH, 64)
    with forward, torch.no_grad():
        model(input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments())
    head, last_products = 2 * 128 * 64 * 97, 2 * (2 * 128 * 96 * 64)
    none, full = (kept_and_computed(made("llama", policy))[1] for policy in ("none", "full"))
    assert full - none == forward.get_total_flops() - head - last_products


def test_every_second_layer_keeps_what_lies_between():
    all_layers, half, none = (
        kept_and_computed(made("llama", *way, num_hidden_layers=4))[0] for way in (("full",), ("full", 2), ("none",))
    )
    assert half == pytest.approx((all_layers + none) / 2, rel=0.02)


def test_nothing_is_computed_again_in_evaluation():
    model = made("llama", "full").eval()
    assert kept_and_computed(model) == kept_and_computed(made("llama", "none").eval())


def test_a_copy_of_a_model_runs_its_own_layers():
    model = made("llama", "full")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(backward(twin)[0], backward(made("llama", "full"))[0])


def test_a_model_whose_layers_are_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"checkpointing: full: transformers does not tell the layers of Linear"):
        recompute(torch.nn.Linear(2, 2), CheckpointingConfig(policy="full"))


def test_the_layers_are_those_that_the_model_repeats():
    assert len(layers_of(tiny("qwen3", num_hidden_layers=3), "key")) == 3
