"""The first optimizer step of a run, as its ranks take it together."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import Tensor

from llmt_train.callbacks import clip
from llmt_train.config import RunConfig
from llmt_train.data.stream import Prefetched, train_batches
from llmt_train.evaluation import evaluate
from llmt_train.fit import build_module, build_trainer
from llmt_train.parallel.reduction import whole
from llmt_train.setup import set_up


class Taken(NamedTuple):
    """What a step was about to change."""

    measures: dict[str, float]
    gradients: dict[str, Tensor]
    norm: float
    """Of the gradient."""
    clipped: float
    """Of the gradient after clipping to half of it."""
    evaluation: dict[str, float]
    """In total, and by source as ``source/measure``."""


class _Look(pl.Callback):
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.measures = pl_module.step_measures()
        self.gradients = {
            name: whole(p.grad).detach().clone() for name, p in pl_module.model.named_parameters() if p.grad is not None
        }
        self.norm = clip(pl_module, None)
        clip(pl_module, self.norm / 2)
        self.clipped = clip(pl_module, None)


def take(configs: list[Mapping[str, Any]]) -> list[Taken]:
    """Take the first step of each run, all ranks of the default process group together."""
    return [_take(RunConfig.model_validate(config)) for config in configs]


def _take(config: RunConfig) -> Taken:
    warnings.simplefilter("ignore")
    setup, look = set_up(config), _Look()
    module = build_module(setup)
    held_out = _flat(evaluate(module, setup, "validation"))
    trainer = build_trainer(setup, look, max_steps=1)
    rows, pairing, rank = setup.dataset.train, setup.pairing["train"], setup.mesh.dp.rank
    stream = Prefetched(lambda: setup.own_tokens(train_batches(rows, setup.plan, 0, pairing, rank)))
    trainer.fit(module, stream)
    stream.close()
    return Taken(look.measures, look.gradients, look.norm, look.clipped, held_out)


def _flat(evaluation: dict[str, Any]) -> dict[str, float]:
    sources = evaluation.pop("sources")
    by_source = {f"{source}/{name}": value for source, means in sources.items() for name, value in means.items()}
    return evaluation | by_source
