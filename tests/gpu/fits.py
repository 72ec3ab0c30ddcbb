"""Real runs of `llmt_train.fit`, and what their own metrics say of them."""

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gpu.device_part import device_of
from gpu.models import LLAMA_1B, LLAMA_HALF, PHI_1B, TINY_LLAMA, TINY_PHI, run_config
from gpu.record import Report, require

from llmt_train.config import RunConfig
from llmt_train.fit import fit
from llmt_train.watch.metrics import read_metrics

Record = Mapping[str, Any]
"""What a run's metrics say of a step."""

_ROOM = 40e9
"""Bytes that a checkpoint of the largest model and its copy in the making may take."""


_FALL = 0.1
"""Nats that every run must win: that only a quarter of the vocabulary occurs is worth ln 4 = 1.39."""


class Sizes(NamedTuple):
    """Of runs."""

    llama: dict[str, Any]
    phi: dict[str, Any]
    half: dict[str, Any]
    """A smaller Llama, to compare settings with."""
    length: int
    """Tokens of a row."""
    step: int
    """Rows of an optimizer step."""
    micro: int
    """Rows of a micro-batch."""
    steps: int
    warmup: int
    """Steps that are not measured."""


SIZES = {
    "dry": Sizes(TINY_LLAMA, TINY_PHI, TINY_LLAMA, 64, 4, 2, 6, 2),
    "quick": Sizes(LLAMA_1B, PHI_1B, LLAMA_HALF, 4096, 4, 2, 14, 4),
    "full": Sizes(LLAMA_1B, PHI_1B, LLAMA_HALF, 4096, 8, 2, 40, 8),
}


def sizes_of(profile: str) -> Sizes:
    """Return the sizes of a profile.

    Raises:
        AbsentError: it needs a CUDA device, and there is none.
    """
    device_of(profile)
    return SIZES[profile]


def try_run(report: Report, name: str, sizes: Sizes, model: dict[str, Any], **more: Any) -> list[Record]:
    """Run and measure as a case; return what the run's metrics say of each step, nothing where it failed.

    Args:
        report: gets the case.
        name: of the case.
        sizes: of the run.
        model: keys of its `from_config`.
        more: keys of its config.
    """
    records: list[Record] = []
    with report.case(name) as values:
        with run_folder() as folder:
            train = {"steps": sizes.steps} | more.pop("train", {})
            config = run_config(model, str(folder / "run"), sizes.length, sizes.step, sizes.micro, train=train, **more)
            begin = time.monotonic()
            records += steps_of(config)
            values.update(speed_of(records[sizes.warmup :]))
            values["loss"] = f"{records[0]['loss']:.3f} -> {records[-1]['loss']:.3f}"
            values["whole s"] = time.monotonic() - begin
        check_losses([record["loss"] for record in records])
    return records


def steps_of(config: RunConfig) -> list[Record]:
    """Train; return what the run's metrics say of each step."""
    fit(config)
    return [record for record in read_metrics(config.output) if "loss" in record]


def check_same_start(report: Report, runs: Mapping[str, Sequence[Record]], tolerance: float) -> None:
    """Require that the first steps of runs have the same loss and gradient: they begin with the same weights.

    Args:
        report: gets the case.
        runs: by name; those that failed are told for themselves, and left out.
        tolerance: largest difference from the first run's, as a share of it.
    """
    (_, first), *others = [(name, records[0]) for name, records in runs.items() if records]
    with report.case("same first step") as values:
        for key in ("loss", "grad_norm"):
            shares = {name: abs(record[key] / first[key] - 1) for name, record in others}
            values[key] = max(shares.values())
            require(
                all(share <= tolerance for share in shares.values()),
                f"{key} differs by these shares: {shares}; allowed {tolerance:g}",
            )


def speed_of(records: Sequence[Record]) -> dict[str, Any]:
    """Medians over steps; only tokens of documents count, not padding."""
    useful = statistics.median(record["tokens_per_s"] * record["fill"] for record in records)
    found = {"tokens/s": useful}
    for name in ("mfu", "tflops"):
        if name in records[0]:
            found[name] = statistics.median(record[name] for record in records)
    return found | {"peak GB": records[-1]["peak_memory"] / 1e9, "data wait": _median(records, "data_wait")}


def check_losses(losses: Sequence[float]) -> None:
    """Require finite losses that fall."""
    require(all(math.isfinite(loss) for loss in losses), f"losses: {losses}")
    last = statistics.median(losses[-3:])
    require(last < losses[0] - _FALL, f"the loss does not fall: {losses[0]:.4f} at first, {last:.4f} at last")


@contextmanager
def run_folder() -> Iterator[Path]:
    """Yield a folder in memory, where there is room, for a run is to be measured and not a disk; remove it after."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > _ROOM
    folder = Path(tempfile.mkdtemp(prefix="llmt-gpu-", dir=memory if has_room else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _median(records: Sequence[Record], name: str) -> float:
    return statistics.median(record[name] for record in records)
