"""What every best-fit-decreasing script does around its packing function.

usage: python bfd_PEER.py LENGTHS.npy L RUNS

It prints {"seconds": median, "rows": ..} of packing all lengths, int32 of 1 to L, at once.
"""

import json
import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np

Lengths = np.ndarray


def arguments() -> tuple[Lengths, int, int]:
    lengths, capacity, runs = sys.argv[1:]
    return np.load(lengths), int(capacity), int(runs)


def main(prepare: Callable[[Lengths, int], Callable[[], int]], **more: Callable[[Lengths, int], float]) -> None:
    """Time what ``prepare(lengths, capacity)`` returns, which packs and returns the number of rows.

    ``more`` are other numbers about the same lengths, by name.
    """
    lengths, capacity, runs = arguments()
    seconds, rows = timed(prepare(lengths, capacity), runs)
    others = {name: function(lengths, capacity) for name, function in more.items()}
    print(json.dumps({"seconds": seconds, "rows": rows} | others))


def timed(function: Callable[[], int], runs: int) -> tuple[float, int]:
    """Median of the seconds, and what the last call returned."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - started)
    return median(seconds), result
