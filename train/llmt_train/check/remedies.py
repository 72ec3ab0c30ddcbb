"""What would make a run fit into a device's memory: the smallest change of each kind."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

from llmt_train.check.estimate import Memory
from llmt_train.config import CheckpointingConfig, RunConfig

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


def remedies(config: RunConfig, now: Memory, needs: Callable[[RunConfig], Memory], limit: float) -> list[Change]:
    """Return the smallest change of each kind after which a run fits; a combination where none is enough.

    Args:
        config: the run that does not fit; its precision is not ``auto``.
        now: what it needs.
        needs: what another run needs.
        limit: bytes that it may need.
    """
    ladders = [_in_bf16(config)] if now.fixed > limit else [_fewer_rows(config), _recomputed(config), _in_bf16(config)]
    found = [change for ladder in ladders if (change := _first_that_fits(ladder, needs, limit)) is not None]
    if found:
        return found
    change = _first_that_fits(_all_together(config), needs, limit)
    return [] if change is None else [change]


def _first_that_fits(ladder: Ladder, needs: Callable[[RunConfig], Memory], limit: float) -> Change | None:
    changes = (Change(setting, needs(changed).total) for setting, changed in ladder)
    return next((change for change in changes if change.total <= limit), None)


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


def _all_together(config: RunConfig) -> Ladder:
    settings = "batch.micro_rows: 1, train.checkpointing: full"
    smallest = _with(config, "batch", micro_rows=1)
    smallest = _with(smallest, "train", checkpointing=CheckpointingConfig(policy="full"))
    yield settings, smallest
    for precision, changed in _in_bf16(smallest):
        yield f"{settings}, {precision}", changed


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
