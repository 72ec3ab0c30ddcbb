"""When a loss is a spike: far above what it usually is, by a rule that the losses before it decide alone.

So a resumed run, which finds those losses in metrics.jsonl, warns at the same steps. A loss is a spike where it lies
above the median of the 16 before it by more than seven times the usual rise. The common rule, so many standard
deviations above a rolling mean, suits a loss that has settled: both are raised by an
earlier spike and, for hundreds of steps, by a loss that falls fast as at the start of a run. A rise from one step to
the next does not see the fall; its 90th percentile is not moved by few spikes, and is large where small batches (of
pairs, above all) make the losses skewed. Of 20 000 losses that are normally distributed, or means of four pairs, none
is called a spike; of as many exponentially distributed ones 3, where seven median absolute deviations would call 88.
For normal losses the limit is ten standard deviations.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

WINDOW = 128
"""Losses that say what is usual: the newest ones."""
LEAST = 48
"""Losses without which nothing is called usual."""
_NEAR = 16
"""Losses that one is compared with."""
_FACTOR = 7.0
_NORMAL_90 = 1.2816
"""By how many standard deviations the 90th percentile of a normal distribution lies above its median."""
_SMALLEST_SHARE, _SMALLEST = 0.01, 1e-3
"""Of the usual loss, and in itself: what the usual rise is at least, so that a loss that hardly moves has no spikes."""


class Usual(NamedTuple):
    """What the losses before a step say of the next one."""

    loss: float
    limit: float
    """Above it a loss is a spike."""


def usual(losses: Sequence[float]) -> Usual | None:
    """Return what is usual after these losses, oldest first.

    ``None`` where they are too few to say, or not above 0, as robust DPO's may be: a share of them means nothing.
    """
    recent = np.asarray(losses)[-WINDOW:]
    near = float(np.median(recent[-_NEAR:])) if len(losses) >= LEAST else 0.0
    if near <= 0:
        return None
    rise = float(np.quantile(np.diff(recent), 0.9)) / _NORMAL_90
    return Usual(near, near + _FACTOR * max(rise, _SMALLEST_SHARE * abs(near), _SMALLEST))


def recent_losses(records: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return the newest losses of metrics.jsonl, as many as matter."""
    return [record["loss"] for record in records if "loss" in record][-WINDOW:]
