"""Liger's fused kernels (Hsu et al. 2024, arXiv:2410.10989) for the norms and gated MLPs of one model.

Liger's own `apply_liger_kernel_to_*` exchange classes and functions of transformers for the whole process, and know
models by their names. Here modules of this model alone get another `forward`, and only those whose output on random
input is what the kernel's formula says: so a family that is not known needs no entry, and one that computes something
else keeps what it has.

Right by its formulas, which are tested on a CPU; the kernels themselves have not been run on a GPU yet.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmt_shared.errors import ConfigError

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest difference of an output as a share of the largest one: rounding, far below what another formula makes."""


Forward = Callable[..., Tensor]


class Kernels(NamedTuple):
    """What Liger computes."""

    rms_norm: Callable[[Tensor, Tensor, float, float, str], Tensor]
    """Of (hidden states, weight, eps, what is added to the weight, `llama` or `gemma`: where it rounds)."""
    silu_mul: Callable[[Tensor, Tensor], Tensor]
    """silu(first) * second."""
    gelu_mul: Callable[[Tensor, Tensor], Tensor]
    """gelu(first) * second, in the approximation by tanh."""


def use_liger(model: Any, kernels: Kernels | None = None, *, device: str = "cuda") -> int:
    """Give norms and gated MLPs of a model fused kernels; return how many modules changed.

    Args:
        model: perhaps on the meta device.
        kernels: Liger's where ``None``.
        device: where it will compute.

    Raises:
        ConfigError: no CUDA device or no `liger-kernel`; or nothing in the model is what they compute.
    """
    chosen = kernels or _of_liger(device)
    changed = [_exchange(module, chosen) for module in model.modules()]
    if not any(changed):
        raise ConfigError(
            f"train.liger: {model.config.model_type} has no norm or MLP that Liger's kernels compute; set it to false"
        )
    return sum(changed)


def _of_liger(device: str) -> Kernels:
    check_liger(device)
    return liger_kernels()


def check_liger(device_type: str) -> None:
    """Refuse to use Liger where its kernels cannot run.

    Raises:
        ConfigError: no CUDA device, or the package is not installed.
    """
    if device_type != "cuda":
        raise ConfigError(f"train.liger: needs a CUDA device, found {device_type}; set it to false")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("train.liger: needs the package liger-kernel; run: pip install 'llmt[liger]'")


def liger_kernels() -> Kernels:
    """Return the kernels of the installed package, with gradients."""
    from liger_kernel.ops import LigerGELUMulFunction, LigerRMSNormFunction, LigerSiLUMulFunction

    def rms_norm(hidden: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
        # Not in place: the gradient that would be written over may be another branch's too.
        output: Tensor = LigerRMSNormFunction.apply(hidden, weight, eps, offset, casting, False)
        return output

    return Kernels(rms_norm, LigerSiLUMulFunction.apply, LigerGELUMulFunction.apply)


def _exchange(module: nn.Module, kernels: Kernels) -> bool:
    forward = _fused_norm(module, kernels) or _fused_mlp(module, kernels)
    if forward is None:
        return False
    module.forward = MethodType(forward, module)  # a method: a copy of the module gets one of its own
    return True


def _fused_norm(module: Any, kernels: Kernels) -> Forward | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or not isinstance(eps, float):
        return None
    for offset, casting in ((0.0, "llama"), (1.0, "gemma")):
        if _agrees(module, weight.shape[0], partial(_rms_norm, weight=weight, eps=eps, offset=offset)):
            return _norm_forward(kernels, eps, offset, casting)
    return None


def _norm_forward(kernels: Kernels, eps: float, offset: float, casting: str) -> Forward:
    def forward(self: Any, hidden: Tensor) -> Tensor:
        return kernels.rms_norm(hidden, self.weight, eps, offset, casting)

    return forward


def _rms_norm(x: Tensor, *, weight: Tensor, eps: float, offset: float) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)


def _fused_mlp(module: Any, kernels: Kernels) -> Forward | None:
    first = getattr(module, "gate_proj", getattr(module, "gate_up_proj", None))
    if not isinstance(getattr(module, "down_proj", None), nn.Linear) or not isinstance(first, nn.Linear):
        return None
    for activation, fused in ((F.silu, kernels.silu_mul), (_gelu, kernels.gelu_mul)):
        plain = _mlp_forward(partial(_times, activation))
        if _agrees(module, first.in_features, partial(plain, module)):
            return _mlp_forward(fused)
    return None


def _times(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _mlp_forward(multiply: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    """A gated MLP; what is multiplied comes from two layers, or from one whose output is cut in half (Phi-3)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        is_one = hasattr(self, "gate_up_proj")
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if is_one else (self.gate_proj(x), self.up_proj(x))
        output: Tensor = self.down_proj(multiply(gate, up))
        return output

    return forward


@torch.no_grad()
def _agrees(module: nn.Module, size: int, formula: Callable[[Tensor], Tensor]) -> bool:
    """Whether a module computes a formula, on random input of a width."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 8, size, generator=generator).to(weight.device, weight.dtype)
    wanted, found = module(probe), formula(probe)
    return bool((wanted - found).abs().max() <= _TOLERANCE[weight.dtype] * wanted.abs().max())
