"""Which backend serves a call, why the others do not, and the one function in front of them.

Shape legend: N packed tokens, H query heads, K key/value heads, D head size.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llmt_shared.errors import ConfigError
from llmt_train.attention import cuda
from llmt_train.attention.sdpa import sdpa
from llmt_train.attention.segments import Backend, Options, Segments

Kernel = Callable[[Tensor, Tensor, Tensor, Segments, Options], Tensor]

_KERNELS: Mapping[str, Kernel] = {
    "flash3": cuda.flash3,
    "flash2": cuda.flash2,
    "varlen": cuda.varlen,
    "flex": cuda.flex,
    "sdpa": sdpa,
}
BACKENDS = tuple(_KERNELS)
"""Fastest first; ``auto`` takes the first that can serve."""

OPTIONAL_MODULES = ("flash_attn_interface", "flash_attn", "triton")
"""Packages that a backend may need."""


class Call(NamedTuple):
    """What decides whether a backend can serve a call."""

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    deterministic: bool = False


class Machine(NamedTuple):
    """Where the call runs."""

    device_type: str
    capability: tuple[int, int] = (0, 0)
    """Compute capability of a CUDA device: (9, 0) is Hopper."""
    modules: frozenset[str] = frozenset()
    """Optional modules that are installed, of those that a backend needs."""
    deterministic_torch: bool = False
    """Whether ``torch.use_deterministic_algorithms`` is on."""


def varlen_attention(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
    deterministic: bool = False,
) -> Tensor:
    """Attend causally inside every segment: [N, H, value size].

    Args:
        q_NHD: queries; under autocast all three are brought to its dtype first.
        k_NKD: keys; H is a multiple of K.
        v_NKD: values; their size may differ from D.
        segments: pieces that tile the N tokens.
        scale: factor of the scores; ``None`` is ``D ** -0.5``.
        window: keys that a query sees, itself included; ``None`` is all of its segment.
        softcap: see ``Options``.
        sinks: [H]; see ``Options``.
        dropout: probability of dropping a weight.
        backend: ``auto``, one of ``BACKENDS``, or a kernel in their place.
        deterministic: refuse backends whose backward may differ from run to run.

    Raises:
        ConfigError: the backend asked for cannot serve, with its reason; or none can.
        ValueError: the segments do not tile the tokens.
    """
    if sum(segments.lengths) != q_NHD.shape[0]:
        raise ValueError(f"segments of {sum(segments.lengths)} tokens for a row of {q_NHD.shape[0]}")
    q_NHD, k_NKD, v_NKD = _one_dtype(q_NHD, k_NKD, v_NKD)
    call = Call(
        q_NHD.dtype, q_NHD.shape[2], v_NKD.shape[2], bool(softcap), sinks is not None, dropout > 0, deterministic
    )
    kernel = _KERNELS[choose(backend, call, machine_of(q_NHD.device))] if isinstance(backend, str) else backend
    scale = q_NHD.shape[2] ** -0.5 if scale is None else scale
    return kernel(q_NHD, k_NKD, v_NKD, segments, Options(scale, window, softcap, sinks, dropout, deterministic))


def choose(backend: str, call: Call, machine: Machine) -> str:
    """Return the backend that serves: the one asked for, or for ``auto`` the first that can.

    Raises:
        ConfigError: it cannot, with its reason; or for ``auto`` none can, with all reasons.
    """
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(f"attention: {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    reasons = {}
    for name in BACKENDS if backend == "auto" else (backend,):
        reason = refusal(name, call, machine)
        if reason is None:
            return name
        reasons[name] = reason
    listed = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
    raise ConfigError(f"attention: {backend}: {listed}; `attention: auto` takes the first backend that can serve")


def refusal(backend: str, call: Call, machine: Machine) -> str | None:
    """Return why a backend cannot serve, as the end of a sentence that begins with its name; ``None`` if it can."""
    if backend != "sdpa" and machine.device_type != "cuda":
        return f"needs a CUDA device, found {machine.device_type}"
    if backend in ("flash3", "flash2", "varlen"):
        return _flash_refusal(call, machine) or _PARTICULAR[backend](call, machine)
    return _PARTICULAR[backend](call, machine)


def machine_of(device: torch.device) -> Machine:
    """Return what is known of a device and of what is installed."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return Machine(device.type, capability, _installed(), torch.are_deterministic_algorithms_enabled())


@functools.cache
def _installed() -> frozenset[str]:
    return frozenset(name for name in OPTIONAL_MODULES if importlib.util.find_spec(name) is not None)


def _flash_refusal(call: Call, machine: Machine) -> str | None:
    """What the three flash kernels have in common."""
    if machine.capability < (8, 0):
        return f"needs compute capability 8.0 (Ampere), found {machine.capability[0]}.{machine.capability[1]}"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"needs fp16 or bf16, found {call.dtype}"
    if call.head_dim > 256 or call.head_dim % 8:
        return f"needs a head size that is a multiple of 8 and at most 256, found {call.head_dim}"
    if call.value_dim != call.head_dim:
        return f"needs values as wide as keys, found {call.value_dim} and {call.head_dim}"
    # A sink needs the gradient of the log-sum-exp, which these kernels do not give: gradients would be 20 % wrong.
    return "has no attention sinks" if call.sinks else None


def _flash3_refusal(call: Call, machine: Machine) -> str | None:
    if machine.capability[0] != 9:
        return f"needs a Hopper GPU (9.x), found {machine.capability[0]}.{machine.capability[1]}"
    if "flash_attn_interface" not in machine.modules:
        return "is not installed (flash_attn_interface)"
    return "has no attention dropout" if call.dropout else None


def _flash2_refusal(call: Call, machine: Machine) -> str | None:
    if "flash_attn" not in machine.modules:
        return "is not installed (pip install 'llmt[flash]')"
    return "has no dropout together with a soft cap" if call.dropout and call.softcap else None


def _varlen_refusal(call: Call, machine: Machine) -> str | None:
    if call.softcap or call.dropout:
        return "has no soft cap" if call.softcap else "has no attention dropout"
    return _nondeterminism(call, machine)


def _flex_refusal(call: Call, machine: Machine) -> str | None:
    if "triton" not in machine.modules:
        return "needs triton"
    if call.dtype == torch.float64:
        return "has no fp64"
    if call.dropout:
        return "has no attention dropout"
    return "has a backward that may differ from run to run" if call.deterministic else None


def _nondeterminism(call: Call, machine: Machine) -> str | None:
    if call.deterministic and machine.device_type == "cuda" and not machine.deterministic_torch:
        return "is deterministic only under torch.use_deterministic_algorithms(True)"
    return None


_PARTICULAR: Mapping[str, Callable[[Call, Machine], str | None]] = {
    "flash3": _flash3_refusal,
    "flash2": _flash2_refusal,
    "varlen": _varlen_refusal,
    "flex": _flex_refusal,
    "sdpa": _nondeterminism,
}


def _one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring queries, keys and values to one dtype: norms of queries and keys leave fp32 behind under autocast."""
    device = q.device.type
    autocast = torch.is_autocast_enabled(device) and v.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else v.dtype
    return q.to(dtype), k.to(dtype), v.to(dtype)
