"""In how many rows a file of a dataset is needed next, seen from where a run stands. Pure.

Evicting what is needed farthest in the future is optimal: Belady 1966, "A study of replacement algorithms for a
virtual-storage computer"; here the future is known, for the order of rows is a function.
"""

import json
import math
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_shared.order import Blocks, block_at

NEVER = float("inf")


class Following(NamedTuple):
    """Where a run stands in its order of rows; a `RowOrder`."""

    seed: int
    num_rows: int
    total_rows: int
    rows_per_shard: int
    shuffle_shards: int
    place: int
    """Of the next row; an epoch has ``num_rows``."""

    @property
    def blocks(self) -> Blocks:
        """The same two numbers, as the order takes them."""
        return Blocks(self.rows_per_shard, self.shuffle_shards)


def distances(names: Iterable[str], dataset: Path, run: Following) -> dict[str, float]:
    """Return for each file in how many rows the run needs it: 0 is now, `NEVER` not again.

    Args:
        names: of files, relative to the dataset.
        dataset: folder with the arrays' metadata.
        run: where it stands.
    """
    of_shard = shard_distances(run)
    return {name: _distance(name, dataset, run, of_shard) for name in names}


def shard_distances(run: Following) -> NDArray[np.float64]:
    """Return in how many rows each shard of the training rows is needed: [shards].

    A shard counts as needed from the first to the last row of its block.
    """
    epoch, place = divmod(run.place, run.num_rows)
    far = np.full(run.blocks.num_shards(run.num_rows), np.inf)
    found = far.copy()
    for each, start in ((epoch, place), (epoch + 1, 0)):
        shift = each * run.num_rows - run.place
        for first, shards in _blocks_from(run, each, start):
            new = shards[~np.isfinite(found[shards])]
            found[new] = max(0, first + shift)
    return np.where(found < max(0, run.total_rows - run.place), found, far)


def _blocks_from(run: Following, epoch: int, place: int) -> Iterable[tuple[int, NDArray[np.int64]]]:
    while place < run.num_rows:
        block = block_at(run.seed, epoch, place, run.num_rows, run.blocks)
        yield block.first, block.shards
        place = block.stop


def _distance(name: str, dataset: Path, run: Following, of_shard: NDArray[np.float64]) -> float:
    match = re.fullmatch(r"(\w+)/(\w+)/c/(\d+)(?:/0)*", name)
    if match is None:
        return 0  # what is no chunk is small and read all the time
    split, array, chunk = match[1], match[2], int(match[3])
    if split != "train":
        return float(run.rows_per_shard * run.shuffle_shards)  # for the next evaluation, whenever that is
    if array == "tokens":
        return float(of_shard[chunk]) if chunk < len(of_shard) else NEVER
    total, per_chunk = _lengths(dataset / split / array)
    ends = np.minimum([chunk * per_chunk, (chunk + 1) * per_chunk], total) * (run.num_rows / max(1, total))
    low, high = (ends // run.rows_per_shard).astype(int).tolist()
    more = drift(run.num_rows, run.rows_per_shard)
    return float(of_shard[max(0, low - more) : high + more + 1].min(initial=np.inf))


def drift(num_rows: int, rows_per_shard: int) -> int:
    """Return by how many shards the files of segments and spans may lie beside their rows.

    Where a row's are is only known on the mean. After n of N rows, which are shuffled, their number is off by a
    standard deviation of at most sqrt(N) / 2 times that of one row in units of its mean, which is below 1.
    """
    return max(1, math.ceil(math.sqrt(num_rows) / rows_per_shard))


@lru_cache(maxsize=256)
def _lengths(array: Path) -> tuple[int, int]:
    """Elements of an array and of one of its chunks."""
    meta: dict[str, Any] = json.loads((array / "zarr.json").read_bytes())
    return int(meta["shape"][0]), int(meta["chunk_grid"]["configuration"]["chunk_shape"][0])
