"""What would make a run fit into a device's memory: the smallest change of each kind."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

from llmt_train.check.estimate import Memory
from llmt_train.config import CheckpointingConfig, RunConfig
from llmt_train.parallel.layout import Layout

_MORE = (1, 2, 4)
"""Times the devices that all parts of parameters would fit on; each is a dry run."""
_MOST_TP = 8
"""Devices that share layers; they should be of one machine."""

Policy = Literal["none", "selective", "attention", "full"]
"""By what they keep, most first."""
Ladder = Iterator[tuple[str, RunConfig]]
"""Changed runs with the settings that changed, smallest change first."""


class Change(NamedTuple):
    """A change of a run, and what the run would need then."""

    setting: str
    """As run.yaml says it."""
    total: int
    """Bytes."""


def remedies(
    config: RunConfig,
    now: Memory,
    needs: Callable[[RunConfig], Memory],
    limit: float,
    layout: Layout | None = None,
) -> list[Change]:
    """Return the smallest change of each kind after which a run fits; a combination where none is enough.

    Args:
        config: the run that does not fit; its precision is not ``auto``.
        now: what it needs.
        needs: what another run needs; raises where it cannot be.
        limit: bytes that it may need.
        layout: of its devices; ``None`` where others would have no memory of their own.
    """
    ladders = [_in_bf16(config)] if now.fixed > limit else [_fewer_rows(config), _recomputed(config), _in_bf16(config)]
    if layout is not None:
        ladders += [_shared_layers(config, layout), _more_devices(config, layout, now, limit), _offloaded(config)]
    found = [change for ladder in ladders if (change := _first_that_fits(ladder, needs, limit)) is not None]
    if found:
        return found
    change = _first_that_fits(_all_together(config), needs, limit)
    return [] if change is None else [change]


def _first_that_fits(ladder: Ladder, needs: Callable[[RunConfig], Memory], limit: float) -> Change | None:
    changes = (Change(setting, total) for setting, changed in ladder if (total := _total(changed, needs)) is not None)
    return next((change for change in changes if change.total <= limit), None)


def _total(config: RunConfig, needs: Callable[[RunConfig], Memory]) -> int | None:
    try:
        return needs(config).total
    except Exception:  # a precision or a layout that the model has not: no remedy
        return None


def _fewer_rows(config: RunConfig) -> Ladder:
    rows = config.batch.micro_rows
    while rows > 1:
        rows //= 2
        yield f"batch.micro_rows: {rows}", _with(config, "batch", micro_rows=rows)


def _recomputed(config: RunConfig) -> Ladder:
    policies, now = get_args(Policy), config.train.checkpointing
    for policy in policies[max(1, policies.index(now.policy) + (now.every == 1)) :]:
        yield f"train.checkpointing: {policy}", _with(config, "train", checkpointing=CheckpointingConfig(policy=policy))


def _in_bf16(config: RunConfig) -> Ladder:
    precisions = ("fp32", "bf16", "bf16-true")
    for precision in precisions[precisions.index(config.precision) + 1 :]:
        yield f"precision: {precision}", config.model_copy(update={"precision": precision})


def _shared_layers(config: RunConfig, layout: Layout) -> Ladder:
    """Layers shared by more devices: by those that are there, or by more where they read the same rows already."""
    tp = layout.tp
    while (tp := 2 * tp) <= _MOST_TP:
        factor = tp // layout.tp
        dp = layout.dp // factor if layout.dp % (factor * layout.replicate) == 0 else layout.dp
        devices = dp * layout.cp * tp
        added = f" on {devices} devices" if devices > layout.world else ""
        yield f"parallel.tp: {tp}{added}", _with(config, "parallel", tp=tp, dp=dp)


def _more_devices(config: RunConfig, layout: Layout, now: Memory, limit: float) -> Ladder:
    """Parts of parameters become smaller; what a micro-batch needs stays. From where that could be enough."""
    if now.total - now.fixed >= limit:
        return
    factor = max(2, 1 << math.ceil(math.log2(max(now.fixed, 1) / limit)))
    for dp in (layout.dp * factor * more for more in _MORE):
        yield f"parallel.dp: {dp} ({dp * layout.cp * layout.tp} devices)", _with(config, "parallel", dp=dp)


def _offloaded(config: RunConfig) -> Ladder:
    if not config.parallel.offload:
        yield "parallel.offload: true", _with(config, "parallel", offload=True)


def _all_together(config: RunConfig) -> Ladder:
    settings = "batch.micro_rows: 1, train.checkpointing: full"
    smallest = _with(config, "batch", micro_rows=1)
    smallest = _with(smallest, "train", checkpointing=CheckpointingConfig(policy="full"))
    yield settings, smallest
    for precision, changed in _in_bf16(smallest):
        yield f"{settings}, {precision}", changed


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
