"""Ours; besides, the seconds of an int32 -> int64 copy of the lengths, and the memory that packing takes."""

from collections.abc import Callable
from pathlib import Path

import bfd
import numpy as np

from llmt_prep.packing import best_fit_decreasing


def prepare(lengths: bfd.Lengths, capacity: int) -> Callable[[], int]:
    best_fit_decreasing(lengths[:1000], capacity)  # compiled, or loaded from numba's cache
    return lambda: len(best_fit_decreasing(lengths, capacity).offsets) - 1


def copy_seconds(lengths: bfd.Lengths, capacity: int) -> float:
    return bfd.timed(lambda: len(lengths.astype(np.int64)), 5)[0]


def bytes_per_document(lengths: bfd.Lengths, capacity: int) -> float:
    """Peak resident memory while packing, above what there was before; the result is part of it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _resident("VmRSS:")
    best_fit_decreasing(lengths, capacity)
    return (_resident("VmHWM:") - before) / len(lengths)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    bfd.main(prepare, copy_seconds=copy_seconds, bytes_per_document=bytes_per_document)
