"""How many bytes lie where, in the middle of a run and in the end: arithmetic on the format's own sizes."""

from collections.abc import Mapping

import numpy as np

from llmt_prep import shards
from llmt_prep.arrays import COLUMN_CHUNK, column_bytes
from llmt_prep.config import MixConfig
from llmt_prep.rows import plan_bytes
from llmt_shared.config import StrictModel


class SplitDisk(StrictModel):
    """Files of one split."""

    shards: int
    files: int
    """Of chunks."""
    arrays: int
    """Bytes of the finished arrays."""
    plan: int
    """Bytes of the plan of its rows, while the dataset is made."""
    sidecars: int
    """Bytes of what waits to be joined, while the dataset is made."""


class Disk(StrictModel):
    """Bytes by place."""

    input: int
    cache: int
    """Tokenized units: they stay, for the next run."""
    plan: int
    """In the staging directory, until the dataset is finished."""
    sidecars: int
    """In the staging directory, until the dataset is finished."""
    dataset: int
    peak: int
    """Of all together, just before the dataset is finished."""
    final: int
    """Of all together, afterwards."""


def split_disk(config: MixConfig, rows: int, segments: int, spans: int, itemsize: int) -> SplitDisk:
    """Return what a split of so many rows takes."""
    length = config.sequence.length
    per_shard = shards.rows_per_shard(rows, length, itemsize, config.shard_size)
    num_shards = shards.num_shards(rows, per_shard)
    columns = shards.column_sizes(config.kind, rows, segments, spans)
    sizes = [column_bytes(count, np.dtype(dtype).itemsize * (width or 1)) for count, dtype, width in columns.values()]
    return SplitDisk(
        shards=num_shards,
        files=num_shards + sum(-(-count // COLUMN_CHUNK) for count, _, _ in columns.values()),
        arrays=num_shards * (per_shard * length * itemsize + 4) + sum(sizes),
        plan=plan_bytes(rows, segments),
        sidecars=shards.sidecar_bytes(config.kind, rows, segments, spans),
    )


def disk_of(splits: Mapping[str, SplitDisk], given: int, cache: int, unit_list: int, companions: int) -> Disk:
    """Return bytes by place.

    Args:
        splits: by name.
        given: bytes of input.
        cache: bytes of tokenized units.
        unit_list: bytes of the list of units, which lies beside the plan.
        companions: bytes of the dataset that are no arrays.
    """
    plan = sum(split.plan for split in splits.values()) + unit_list
    sidecars = sum(split.sidecars for split in splits.values())
    dataset = sum(split.arrays for split in splits.values()) + companions
    final = given + cache + dataset
    peak = final + plan + sidecars
    return Disk(input=given, cache=cache, plan=plan, sidecars=sidecars, dataset=dataset, peak=peak, final=final)
