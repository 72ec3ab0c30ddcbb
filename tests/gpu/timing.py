"""Time and memory of a function on the device: medians after a warm-up, peaks beyond what was there before."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], Any]


def median_ms(work: Work, device: str, repeats: int) -> float:
    """Return the median time in milliseconds; two runs before it warm up."""
    for _ in range(2):
        work()
    measure = _cuda_ms if device == "cuda" else _host_ms
    return statistics.median(measure(work) for _ in range(repeats))


def peak_mb(work: Work, device: str) -> float | None:
    """Return the most MB (1e6 bytes) held beyond what was held before; ``None`` on a CPU, where nobody counts."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def wait(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def _cuda_ms(work: Work) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _host_ms(work: Work) -> float:
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3
