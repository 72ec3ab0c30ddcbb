"""`llmt-train ref`: the reference's log-probabilities of all pairs, once, beside the dataset."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmt_shared import durable
from llmt_shared.dataset import Dataset
from llmt_shared.errors import ConfigError, DataError, FormatError, Stopped
from llmt_shared.progress import stage
from llmt_train.config import RunConfig
from llmt_train.data.rows import AnySplit
from llmt_train.data.stream import Prefetched, read_ahead, read_batch
from llmt_train.lock import locked
from llmt_train.parallel.mesh import open_mesh
from llmt_train.parallel.process import joined
from llmt_train.policy import Logps, device, on_one_device, open_reference
from llmt_train.quiet import quiet_transformers
from llmt_train.reference import (
    IDENTITY,
    Identity,
    overlay_path,
    read_identity,
    sha256_of,
)
from llmt_train.setup import identity, open_data, splits_of
from llmt_train.stopping import StopRequest

_BLOCK = 4096  # rows whose pairs are looked at together
_SECONDS_BETWEEN_SYNCS = 20.0


@dataclass(frozen=True)
class PrecomputeResult:
    """What is there now."""

    directory: str
    pairs: int
    """Of all splits."""
    computed: int
    """Of them by this call; the others were there."""


def precompute(config: RunConfig, *, force: bool = False) -> PrecomputeResult:
    """Write the overlay that `dpo.reference: precomputed` reads; go on where an earlier call was stopped.

    Args:
        config: a run of task dpo; its model is the reference.
        force: replace an overlay that was computed in another way, or a damaged one.

    Raises:
        ConfigError: no run of dpo, or something does not fit together.
        DataError: a log-probability is not finite.
        FormatError: the dataset, or an overlay that was finished, is damaged.
        Stopped: asked to stop; running the same command again goes on.
    """
    if config.task != "dpo":
        raise ConfigError(f"task: {config.task} has no reference; `llmt-train ref` is for task dpo")
    alone = on_one_device(config)
    dataset, plan = open_data(config)
    if not isinstance(dataset, Dataset):
        raise ConfigError("data: synthetic rows lie nowhere, so nothing lies beside them; set `dpo.reference: model`")
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        stop = stack.enter_context(StopRequest())
        stack.enter_context(joined(alone.parallel))
        logps, weigh = open_reference(alone, dataset, open_mesh(alone.parallel))
        wanted = identity(config, dataset, weigh())
        folder = overlay_path(dataset.folder, wanted.weights)
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder, "wait for it"))
        _begin(folder, wanted, force)
        computing = partial(_compute, logps=logps, micro_rows=plan.micro_rows, stop=stop)
        splits, entries = splits_of(dataset), dataset.manifest.splits
        computed = sum(
            computing(split, folder / f"{name}.npy", entries[name].segments) for name, split in splits.items()
        )
        _finish(folder, wanted, list(splits))
    pairs = sum(entry.pairs or 0 for entry in entries.values())
    return PrecomputeResult(str(folder), pairs, computed)


def _begin(folder: Path, wanted: Identity, force: bool) -> None:
    """Make sure that what lies there is part of what is wanted."""
    found = None if force else read_identity(folder)
    if found is not None:
        same = ("digest", "weights", "precision", "attention")
        changed = [
            f"{key} {getattr(found, key)}, not {getattr(wanted, key)}"
            for key in same
            if getattr(found, key) != getattr(wanted, key)
        ]
        if changed:
            raise ConfigError(f"{folder}: was computed with {' and '.join(changed)}; --force computes it again")
        _check_finished(folder, found)
    else:
        for path in folder.glob("*.npy"):
            path.unlink()
    if found is None:
        durable.write(folder / IDENTITY, wanted.model_dump_json(indent=1))


def _check_finished(folder: Path, found: Identity) -> None:
    """Refuse finished files that have changed: they would be called finished again, with a digest of the damage."""
    for name, wanted in found.sha256.items():
        path = folder / f"{name}.npy"
        if path.exists() and sha256_of(path) != wanted:
            raise FormatError(f"{path}: is damaged: its sha256 is not that of {IDENTITY}; --force computes it again")


def _finish(folder: Path, identity: Identity, names: list[str]) -> None:
    digests = {name: sha256_of(folder / f"{name}.npy") for name in names}
    complete = identity.model_copy(update={"complete": True, "sha256": digests})
    durable.write(folder / IDENTITY, complete.model_dump_json(indent=1))


def _compute(
    split: AnySplit, path: Path, num_segments: int, *, logps: Logps, micro_rows: int, stop: StopRequest
) -> int:
    """Fill in what is missing of a split; return the number of pairs computed."""
    values = _open(path, num_segments)
    rows = np.concatenate([np.empty(0, np.int64), *_missing(split, values)])
    parts = [rows[first : first + micro_rows] for first in range(0, len(rows), micro_rows)]
    batches = Prefetched(lambda: ((part, read_batch(split, part, {})) for part in read_ahead(split, parts)))
    computed, synced = 0, time.monotonic()
    try:
        with stage(f"reference, {path.stem}", len(rows)) as advance:
            for part, batch in batches:
                table = split.pairs(part)
                assert table is not None  # the dataset is of preference pairs
                values[table.numbers] = _finite(logps(batch.to(device())), split, part)
                computed += len(table.numbers)
                advance(len(part))
                if stop.signal_name is not None:
                    raise Stopped(f"{path.parent}: what was computed is kept; run the same command again to go on")
                if time.monotonic() - synced > _SECONDS_BETWEEN_SYNCS:
                    values.flush()
                    synced = time.monotonic()
    finally:
        batches.close()
        values.flush()
    return computed


def _open(path: Path, num_segments: int) -> Any:
    """Map the file to write; a new one is all NaN."""
    if not path.exists():
        with durable.writing(path) as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f8", "fortran_order": False, "shape": (num_segments,)}
            )
            for first in range(0, num_segments, 1 << 20):
                file.write(np.full(min(1 << 20, num_segments - first), math.nan, "<f8").tobytes())
    return np.load(path, mmap_mode="r+", allow_pickle=False)


def _missing(split: AnySplit, values: NDArray[np.float64]) -> Iterator[NDArray[np.int64]]:
    """Rows with a pair that is not computed, block by block."""
    for first in range(0, split.num_rows, _BLOCK):
        rows = np.arange(first, min(first + _BLOCK, split.num_rows))
        table = split.pairs(rows)
        assert table is not None  # the dataset is of preference pairs
        is_missing = np.isnan(values[table.numbers]).any(axis=1)
        yield np.unique(np.repeat(rows, table.per_row)[is_missing])


def _finite(logps: Tensor, split: AnySplit, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = logps.cpu().numpy()
    if not np.isfinite(found).all():
        raise DataError(
            f"{split.path}: the reference gives no finite log-probability in one of the rows {rows.tolist()}; "
            "`llmt-prep inspect` shows a row; does the model compute in this precision?"
        )
    return found
