"""What this machine is, and its ceilings: how fast it multiplies and copies."""

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from gpu.record import AbsentError, Report, require
from gpu.timing import median_ms, wait

from llmt_train.attention import BACKENDS, OPTIONAL_MODULES, Call, machine_of, refusal

_PACKAGES = (
    "torch", "triton", "transformers", "lightning", "pytorch-lightning", "safetensors", "numpy", "pydantic", "peft",
    "liger-kernel", "flash-attn", "flash-attn-3",
)  # fmt: skip


class Sizes(NamedTuple):
    """Of the two ceilings."""

    matrix: int
    """Rows and columns."""
    copied: int
    """Bytes."""


SIZES = {"dry": Sizes(128, 1 << 16), "quick": Sizes(8192, 1 << 32), "full": Sizes(8192, 1 << 32)}


def device_of(profile: str) -> str:
    """Return where a profile runs.

    Raises:
        AbsentError: it needs a CUDA device, and there is none.
    """
    if profile == "dry":
        return "cpu"
    if not torch.cuda.is_available():
        raise AbsentError("no CUDA device")
    return "cuda"


def run(report: Report, profile: str) -> None:
    """Describe and measure."""
    with report.case("versions") as values:
        values.update(_versions())
    with report.case("device") as values:
        values.update(_device(device_of(profile)))
    for name in BACKENDS:
        with report.case(f"attention {name}"):
            reason = refusal(name, Call(torch.bfloat16, 64, 64), machine_of(torch.device(device_of(profile))))
            if reason is not None:
                raise AbsentError(f"{name} {reason}")
    with report.case("matrix product, bf16") as values:
        values["TFLOP/s"] = _product(SIZES[profile].matrix, device_of(profile))
    with report.case("copy") as values:
        values["GB/s"] = _copy(SIZES[profile].copied, device_of(profile))


def _versions() -> dict[str, Any]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _device(device: str) -> dict[str, Any]:
    machine = machine_of(torch.device(device))
    found: dict[str, Any] = {"name": platform.machine(), "modules": sorted(machine.modules & set(OPTIONAL_MODULES))}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "GB": properties.total_memory / 1e9, "CUDA": str(torch.version.cuda)}
        found |= {"capability": ".".join(map(str, machine.capability)), "driver": _driver()}
        require(torch.cuda.is_bf16_supported(including_emulation=False), "the device has no bf16")
    return found


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {error}"


def _product(size: int, device: str) -> float:
    """FLOP/s in 1e12 of a square product of random matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b, device, 20) / 1e9


def _copy(size: int, device: str) -> float:
    """GB/s, bytes read and written."""
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    wait(device)
    return 2 * size / median_ms(lambda: target.copy_(source), device, 10) / 1e6
