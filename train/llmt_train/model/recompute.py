"""Activation checkpointing: what the backward pass computes again instead of keeping it.

By layers (Chen et al. 2016, arXiv:1604.06174), and by operations inside them, as torchtitan does (Liang et al. 2024,
arXiv:2410.06511). A layer gets a ``forward`` of its own, a method: so a copy of the model gets methods of the copy.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from llmt_shared.errors import ConfigError
from llmt_train.config import CheckpointingConfig

_aten = torch.ops.aten
_PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.linear.default})
_ATTENTION = (
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "torch_attn._varlen_attn",
    "flash_attn._flash_attn_varlen_forward",
    "flash_attn_3._flash_attn_forward",
    "flash_attn_3.fwd",
)
"""Operations of the attention kernels; those of packages exist once the package is imported."""


def recompute(model: nn.Module, config: CheckpointingConfig) -> None:
    """Let every ``config.every``-th layer keep only what the policy says. Values and gradients stay the same.

    Raises:
        ConfigError: transformers does not say what the model's layers are; or the policy cannot tell their operations.
    """
    if config.policy == "none":
        return
    run = _RUN[config.policy]
    layers = layers_of(model, f"train.checkpointing: {config.policy}")[:: config.every]
    if config.policy != "full" and any(_gathers_inside(layer) for layer in layers):
        raise ConfigError(
            f"train.checkpointing: {config.policy} cannot tell what a layer computes from what it gathers of parts "
            "that train in another dtype than the rest (precision: bf16-true); wanted full, none or another precision"
        )
    for layer in layers:
        layer.forward = MethodType(_checkpointed(layer.forward.__func__, run), layer)


def _gathers_inside(layer: nn.Module) -> bool:
    """Whether parts of a layer are sharded for themselves: see `sharding`."""
    return any(isinstance(module, FSDPModule) for module in layer.modules() if module is not layer)


def layers_of(model: nn.Module, key: str) -> list[Any]:
    """Return the layers that a model repeats.

    Raises:
        ConfigError: transformers does not say what they are; ``key`` is what asked for them.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"{key}: transformers does not tell the layers of {type(model).__name__}; do without it")
    return layers


def _checkpointed(inner: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's ``forward`` that is computed again in the backward pass of training."""

    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        call = partial(inner, self, **keywords)
        return run(call, *arguments) if self.training and torch.is_grad_enabled() else call(*arguments)

    return forward


def _keeping(policy: Callable[[], Callable[..., CheckpointPolicy]]) -> Callable[..., Any]:
    """A checkpointing function; every call of a layer gets a policy of its own, for it may count."""

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy())  # type: ignore[no-untyped-call]

    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def _attention_alone() -> Callable[..., CheckpointPolicy]:
    attention = _attention_operations()

    def policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in attention else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _every_second_product() -> Callable[..., CheckpointPolicy]:
    attention = _attention_operations()
    products = {False: 0, True: 0}  # counted apart: in the forward pass and when it is computed again

    def policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        if operation in _PRODUCTS:
            products[context.is_recompute] += 1
        is_kept = operation in attention or (operation in _PRODUCTS and products[context.is_recompute] % 2 == 1)
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _attention_operations() -> set[Any]:
    found = set()
    for path in _ATTENTION:
        namespace, name = path.split(".")
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None:
            found |= {getattr(packet, overload) for overload in packet.overloads()}
    return found


_RUN: dict[str, Callable[..., Any]] = {
    "full": partial(checkpoint, use_reentrant=False),
    "attention": _keeping(_attention_alone),
    "selective": _keeping(_every_second_product),
}
