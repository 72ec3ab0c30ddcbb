"""What a run is made with: versions, devices, threads. Nothing of who started it, from where, or by which command."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("llmt", "torch", "lightning", "transformers", "tokenizers", "numpy")
_DRIVER = Path("/proc/driver/nvidia/version")


def environment() -> dict[str, Any]:
    """Return what results may depend on beside the config and the data, as plain data; ``None`` is not known."""
    devices = _devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": devices[0]["name"] if devices else platform.machine(),
        "devices": devices,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if devices else None,  # type: ignore[no-untyped-call]
        "driver": _driver(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the releases of the packages that a run rests on; ``None`` where one is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def _devices() -> list[dict[str, Any]]:
    """The GPUs that this process sees."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": each.name, "memory": each.total_memory} for each in found]


def _driver() -> str | None:
    """First line of what NVIDIA's kernel module says of itself."""
    try:
        return _DRIVER.read_text().splitlines()[0].removeprefix("NVRM version:").strip()
    except (OSError, IndexError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
