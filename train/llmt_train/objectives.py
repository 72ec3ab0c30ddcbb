"""Losses as pure functions of per-token log-probabilities: ``(token_logps, batch) -> LossTerms``.

A loss is a sum, never a mean: a micro-batch cannot know by what the whole optimizer step divides, the step does.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from llmt_train.batch import PackedBatch


class LossTerms(NamedTuple):
    """The loss of one micro-batch, not yet divided."""

    loss_sum: Tensor
    """Scalar; summed over what the denominator counts."""
    denominator: float
    """What the sum is divided by: a count over the WHOLE optimizer step, all its micro-batches and ranks."""
    metrics: dict[str, Tensor]
    """Further sums over this micro-batch, detached, to be divided by the same denominator."""


Objective = Callable[[Tensor, PackedBatch], LossTerms]


def clm(token_logps: Tensor, batch: PackedBatch) -> LossTerms:
    """Next-token cross-entropy over all targets.

    Args:
        token_logps: [N]; log-probability of each token's label, 0 where there is none.
        batch: its denominator ``targets`` counts the step's targets.
    """
    return LossTerms(-token_logps.sum(), batch.denominators["targets"], {})
