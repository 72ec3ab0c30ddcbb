"""How much arithmetic a model needs, and how much a device can do: for MFU and for estimates of time.

Counted as the field does (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B): matrix products alone, what is
computed again for activation checkpointing not counted. Attention counts the keys that causal attention inside each
segment really sees, so that packing short documents does not look like long context.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmt_train.check.devices import find_gpu


class ModelFlops(NamedTuple):
    """Floating point operations of a forward and backward pass."""

    per_token: float
    """Of all matrix products with weights."""
    per_key: float
    """Of all layers' attention, for one query and one key that it sees."""


def model_flops(model: Any) -> ModelFlops:
    """Count what a training step needs, by the model's layers and its config.

    The backward pass of a layer is twice its forward pass, and only once where its weight does not train. Of experts
    those are counted that a token is sent to. Works on the meta device.
    """
    config = model.config.get_text_config()
    seen: set[int] = set()
    per_token = 0.0
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue  # a look-up
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2 or (id(parameter) in seen and module is not head):
                continue
            seen.add(id(parameter))
            per_token += (6 if parameter.requires_grad else 4) * parameter.numel() * _share_used(name, config)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelFlops(per_token, 12.0 * layers * heads * head_dim)


def _share_used(name: str, config: Any) -> float:
    """Share of a layer's weights that a token meets."""
    if ".experts" not in name:
        return 1.0
    total = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = getattr(config, "num_experts_per_tok", None)
    return used / total if used and total else 1.0


def step_flops(flops: ModelFlops, lengths: NDArray[np.integer]) -> float:
    """Return what segments of these lengths need; a query sees itself and what is before it."""
    tokens = lengths.astype(np.float64)
    return float(flops.per_token * tokens.sum() + flops.per_key * (tokens * (tokens + 1) / 2).sum())


def peak_flops(device_name: str) -> float | None:
    """Return a device's dense bf16 peak in FLOP/s by its name, `NVIDIA H100 80GB HBM3`; ``None`` if not known."""
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.flops


def this_device_name() -> str | None:
    """Return the GPU's name; ``None`` without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
