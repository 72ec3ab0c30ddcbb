"""GPUs by name, and this machine: arithmetic per second and memory."""

import difflib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from llmt_shared.errors import ConfigError
from llmt_train.attention import OPTIONAL_MODULES, Machine, machine_of


class Gpu(NamedTuple):
    """A GPU as its maker describes it."""

    name: str
    """Part of what the driver calls it."""
    flops: float
    """Dense bf16 FLOP/s with fp32 accumulation."""
    memory: tuple[int, ...]
    """GB that it is sold with; the driver's name says which, else it is the first."""
    capability: tuple[int, int]
    """CUDA's."""


_GPUS = (
    Gpu("GH200", 989e12, (96, 144), (9, 0)),
    Gpu("H100 PCIe", 756e12, (80,), (9, 0)),
    Gpu("H100 NVL", 835e12, (94,), (9, 0)),
    Gpu("H200", 989e12, (141,), (9, 0)),
    Gpu("H100", 989e12, (80, 64, 96), (9, 0)),
    Gpu("H800", 989e12, (80,), (9, 0)),
    Gpu("B200", 2250e12, (180,), (10, 0)),
    Gpu("B100", 1750e12, (180,), (10, 0)),
    Gpu("A100", 312e12, (80, 40), (8, 0)),
    Gpu("A800", 312e12, (80, 40), (8, 0)),
    Gpu("A40", 149.7e12, (48,), (8, 6)),
    Gpu("A10G", 70e12, (24,), (8, 6)),
    Gpu("A10", 125e12, (24,), (8, 6)),
    Gpu("L40S", 362e12, (48,), (8, 9)),
    Gpu("L40", 181e12, (48,), (8, 9)),
    Gpu("L4", 121e12, (24,), (8, 9)),
    Gpu("RTX 6000 Ada", 364e12, (48,), (8, 9)),
    Gpu("RTX 5090", 209.5e12, (32,), (12, 0)),
    Gpu("RTX 4090", 165.2e12, (24,), (8, 9)),
    Gpu("RTX 3090", 71e12, (24,), (8, 6)),
)
"""From the makers' data sheets; a name stands before those that are part of it."""

_UTILISATION = {"cuda": 0.4, "cpu": 0.6}
"""Share of the arithmetic that training is assumed to reach: of the data sheet's on a GPU; of a large matrix product's
on a CPU, where small models were measured to reach 56 to 74 %."""


_LIBRARIES = 1.5e9
"""Bytes for what is no tensor: the CUDA context, workspaces, code."""
_ALLOCATOR = {"cuda": 1.0, "cpu": 1.5}
"""Memory that a process has by memory that is in use: 1.08 to 1.56 were measured on a CPU with glibc's allocator. On a
GPU the makers' GB, which are nearly GiB, leave some room."""


class Device(NamedTuple):
    """Where a run is to train."""

    name: str
    machine: Machine
    memory: int | None
    """Bytes; ``None`` is not known."""
    flops: float | None
    """FLOP/s in the run's precision; ``None`` is not known."""
    utilisation: float
    """Share of them that training is assumed to reach."""
    is_here: bool

    @property
    def room(self) -> float | None:
        """Bytes that the tensors of a run may have; ``None`` is not known."""
        if self.memory is None:
            return None
        return (self.memory - _LIBRARIES) / _ALLOCATOR[self.machine.device_type]


def find_gpu(name: str) -> Gpu | None:
    """Return what a GPU's name or the driver's name for it stands for: `H100`, `NVIDIA H100 80GB HBM3`."""
    return next((gpu for gpu in _GPUS if gpu.name.lower() in name.lower()), None)


def named_device(name: str, computes_in_bf16: Callable[[Machine], bool]) -> Device:
    """Return what is known of a GPU that is not here; optional kernels are taken to be installed there.

    Raises:
        ConfigError: no GPU of that name is known.
    """
    gpu = find_gpu(name)
    if gpu is None:
        known = [each.name for each in _GPUS]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"--on: {name!r} is no GPU that is known{hint}; known: {', '.join(known)}")
    machine = Machine("cuda", gpu.capability, frozenset(OPTIONAL_MODULES))
    flops = gpu.flops if computes_in_bf16(machine) else None
    size = _sold_size(gpu, name)
    # A maker's GB is nearly a GiB; the smaller one leaves room for the driver.
    return Device(f"{gpu.name} {size} GB", machine, size * 10**9, flops, _UTILISATION["cuda"], is_here=False)


def this_device(computes_in_bf16: Callable[[Machine], bool], processes: int = 1) -> Device:
    """Return the GPU of this machine, or its CPU: by the data sheet, or by how fast a matrix product is.

    Args:
        computes_in_bf16: whether the run does, on a machine.
        processes: of the run, on this machine; each has a GPU, or its share of the CPU.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    machine = machine_of(torch.device(kind))
    bf16 = computes_in_bf16(machine)
    if kind == "cpu":
        name, memory, gpu = _cpu_name(processes), _ram(), None
    else:
        properties = torch.cuda.get_device_properties(0)
        name, memory, gpu = properties.name, int(properties.total_memory), find_gpu(properties.name)
    flops = gpu.flops if gpu is not None and bf16 else measured_flops(kind, torch.bfloat16 if bf16 else torch.float32)
    if kind == "cpu":
        memory, flops = None if memory is None else memory // processes, flops / processes
    return Device(name, machine, memory, flops, _UTILISATION[kind], is_here=True)


def _cpu_name(processes: int) -> str:
    share = f"1/{processes} of " if processes > 1 else ""
    return f"{share}this CPU ({torch.get_num_threads()} threads)"


def measured_flops(device_type: str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the FLOP/s of a matrix product of this machine."""
    size = 1024 if device_type == "cpu" else 8192
    a = torch.ones(size, size, device=device_type, dtype=dtype)
    wait: Callable[[], None] = torch.cuda.synchronize if device_type == "cuda" else lambda: None  # it runs apart
    a @ a  # the first one prepares
    wait()
    started, count = time.monotonic(), 0
    while (passed := time.monotonic() - started) < seconds or not count:
        a @ a
        wait()
        count += 1
    return count * 2 * size**3 / passed


def _sold_size(gpu: Gpu, name: str) -> int:
    """GB, as a name such as `A100-SXM4-40GB` says it."""
    named = [int(size) for size in re.findall(r"(\d+) ?GB", name)]
    return next((size for size in named if size in gpu.memory), gpu.memory[0])


def _ram() -> int | None:
    """Bytes that processes here may have: of the machine, or of the container."""
    limits = []
    with suppress(OSError, ValueError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # `max` where there is no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)
