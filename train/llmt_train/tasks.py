"""What each task trains on and by what loss."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor

from llmt_train.config import RunConfig
from llmt_train.data.batch import PackedBatch
from llmt_train.objectives import Objective, clm, dpo, orpo

KINDS: Mapping[str, str] = {"pretrain": "pretrain", "sft": "sft", "dpo": "preference", "orpo": "preference"}
"""The kind of dataset that a task trains on."""


class Task(NamedTuple):
    """How scores become the loss of a step, and of an evaluation."""

    objective: Objective
    """What the steps minimise."""
    evaluation: Objective
    """What held-out rows are measured by: the same, without what belongs to training alone."""
    with_mean: bool = False
    """Whether the objective reads ``mean_logps``."""
    is_uniform: bool = False
    """Whether the objective is the sum of the log-probabilities times one number, which makes its gradient cheaper."""
    neftune: float = 0.0
    """Noise on the embeddings in training, the paper's alpha; 0 is none."""
    reference: Callable[[PackedBatch], Tensor] | None = None
    """The reference's log-probabilities of a micro-batch's pairs, [Q, 2], where they are not read from the disk."""


def build_task(config: RunConfig, reference: Callable[[PackedBatch], Tensor] | None = None) -> Task:
    """Return the run's task.

    Args:
        config: the run.
        reference: of dpo with ``reference: model``.
    """
    if config.task == "dpo":
        objective = partial(dpo, **config.dpo.model_dump(exclude={"reference"}))
        return Task(objective, objective, reference=reference)
    if config.task == "orpo":
        objective = partial(orpo, **config.orpo.model_dump())
        return Task(objective, objective)
    settings = config.clm
    objective = partial(clm, **settings.model_dump(exclude={"neftune"}))
    with_mean = settings.label_smoothing > 0
    return Task(
        objective, clm, with_mean=with_mean, is_uniform=not with_mean and not settings.z_loss, neftune=settings.neftune
    )
