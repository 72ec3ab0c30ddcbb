"""Rows of one flat file of tokens through np.memmap, as nanoGPT reads, in the order of a permutation.

The flat files are the format; offsets and lengths of segments are read into memory when they are opened.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import loader_job
import numpy as np
from loader_job import FullBatch, MicroBatch, collate, complete, open_flat


def write(folder: Path, output: Path) -> None:
    shutil.copytree(folder, output)


def batches(path: Path, micro_rows: int, way: str) -> Iterator[MicroBatch | FullBatch]:
    """``way``: `five` tensors as the other peers, or `all` that llmt makes."""
    flat, random = open_flat(path), np.random.default_rng(0)
    while True:
        order = random.permutation(len(flat.tokens)).tolist()
        for start in range(0, len(order), micro_rows):
            rows = order[start : start + micro_rows]
            batch = collate([flat.tokens[row] for row in rows], [flat.lengths(row) for row in rows])
            yield batch if way == "five" else complete(batch)


if __name__ == "__main__":
    loader_job.main(batches, write)
