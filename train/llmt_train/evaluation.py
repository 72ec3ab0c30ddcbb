"""What a model scores on a split: now and then in a run, and by `llmt-train validate`."""

import math
from collections.abc import Callable
from typing import Any

import torch

from llmt_train.data.stream import eval_batches
from llmt_train.model.load import evaluating
from llmt_train.module import TrainModule
from llmt_train.policy import device
from llmt_train.setup import Setup

Record = dict[str, Any]


@torch.no_grad()
def evaluate(
    module: TrainModule, setup: Setup, split: str, advance: Callable[[int], None] = lambda rows: None
) -> Record:
    """Return the means of every measure over a split, in total and by source, and the counts they are means over.

    Args:
        module: built from ``setup``, its model on the device.
        setup: the run's.
        split: one of its splits.
        advance: told how many more rows are done.
    """
    module.on_validation_epoch_start()
    rank, ranks = setup.mesh.dp.rank, setup.mesh.dp.size
    batches = eval_batches(setup.splits[split], setup.plan.micro_rows, setup.pairing[split], rank=rank, ranks=ranks)
    with evaluating(module):
        for index, batch in enumerate(setup.own_tokens(batches)):
            module.validation_step(batch.to(device(), non_blocking=True), index)
            advance(len(batch.row_places) * ranks)
    result = module.evaluation.over(setup.mesh.averaged)
    by_source = {name: result.means(index) for index, name in enumerate(setup.dataset.sources)}
    # A source may hold out nothing.
    sources = {name: with_perplexity(means) for name, means in by_source.items() if means}
    return {**with_perplexity(result.means()), "sources": sources}


def with_perplexity(means: dict[str, float]) -> Record:
    """Add the perplexity, weighted by tokens, of a negative log-likelihood; infinite where that overflows."""
    if "nll" not in means:
        return means
    return means | {"perplexity": math.exp(means["nll"]) if means["nll"] < 700 else math.inf}
