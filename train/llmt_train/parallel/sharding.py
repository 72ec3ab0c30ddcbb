"""Parameters sharded over ranks, gathered layer by layer while they are used.

FSDP2 (Zhao et al. 2023, arXiv:2304.11277), always, also over one rank: then every parameter is a DTensor on one mesh
whatever the layout, the optimizer and the clipping see the same thing, and weights in fp32 compute in bf16 without a
copy of them in either precision.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from llmt_train.parallel.mesh import Mesh

T = TypeVar("T")


def shard(model: Any, mesh: Mesh, *, compute: torch.dtype | None = None, offload: bool = False) -> None:
    """Shard a model's parameters over the ranks that average gradients; gradients are reduced in fp32.

    Each layer is gathered by itself, and what lies outside the layers (embedding, last norm, head) with the model.
    What trains in another dtype than the rest of these is gathered apart.

    Args:
        model: of transformers, its parameters perhaps split over tp; on the meta device or not.
        mesh: of this process.
        compute: dtype in which parameters are gathered and computed with; ``None`` is their own.
        offload: keep the parts of this rank in the host's memory.
    """
    policy: OffloadPolicy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    root = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for unit in [*layers, model]:
        for module in _of_other_dtypes(unit):
            fully_shard(module, mesh=mesh.fsdp, mp_policy=_precision(compute), offload_policy=policy)
        precision = root if unit is model else _precision(compute)
        fully_shard(unit, mesh=mesh.fsdp, mp_policy=precision, offload_policy=policy)
    model.run_function = MethodType(_run, model)
    register_fsdp_forward_method(model, "run_function")


def _of_other_dtypes(unit: nn.Module) -> list[nn.Module]:
    """Modules that train in another dtype than most of a unit: FSDP2 wants one dtype of all that it gathers at once.

    With weights in bf16 there may be fp32 beside them: adapters, or what a family wants so, such as routers.
    """
    dtypes = {
        module: {parameter.dtype for parameter in module.parameters(recurse=False) if parameter.requires_grad}
        for module in _own_modules(unit)
    }
    found = Counter(dtype for each in dtypes.values() for dtype in each)
    if len(found) < 2:
        return []
    [(usual, _)] = found.most_common(1)
    return [module for module, each in dtypes.items() if each - {usual}]


def _own_modules(unit: nn.Module) -> Iterator[nn.Module]:
    """A module and those inside it, but for those that are sharded already."""
    yield unit
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own_modules(child)


def _precision(compute: torch.dtype | None) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(compute, torch.float32)


def _run(self: nn.Module, function: Callable[[], T]) -> T:
    del self
    return function()


def run_forward(model: Any, function: Callable[[], T]) -> T:
    """Call a function that computes with a model's weights outside of its layers, as if it were the model's forward.

    Around a forward pass FSDP2 gathers the weights, and after the backward pass, or here where none will follow, lets
    go of them. Gradients come from the tensors that the function returns, in whatever containers. A model that is not
    sharded just calls it.
    """
    if not isinstance(model, FSDPModule):
        return function()
    result: T = model.run_function(function)  # type: ignore[attr-defined]
    if not torch.is_grad_enabled():
        model.reshard()
    return result


def synchronise_gradients(model: nn.Module, wanted: bool) -> None:
    """Decide whether the next backward pass exchanges gradients, or adds them up on each rank."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
