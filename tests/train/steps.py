"""Optimizer steps through Lightning's own loop, and what they would have changed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from llmt_train.config import RunConfig
from llmt_train.data.batch import PackedBatch
from llmt_train.model.head import find_head
from llmt_train.module import TrainModule
from llmt_train.objectives import clm
from llmt_train.parallel.layout import Layout, Place
from llmt_train.parallel.mesh import ALONE, Mesh
from llmt_train.tasks import Task, build_task

MARKS = [
    # Lightning finds a validation_step without validation data; training alone is what these tests run.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # Lightning 2.6 still asks torch's pytree for a class that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
]
"""For the `pytestmark` of whoever calls `run`."""


def task_of(task: str, settings: Mapping[str, Any], reference: Callable[[PackedBatch], Tensor] | None = None) -> Task:
    """What a run trains on; ``settings`` are those of the config's section that belongs to the task."""
    section = "clm" if task in ("pretrain", "sft") else task
    config = {
        "task": task, "model": "none", "data": "data", "output": "run", "batch": {"tokens": 1}, "train": {"steps": 1},
        "optim": {"lr": 1.0}, section: dict(settings),
    }  # fmt: skip
    return build_task(RunConfig.model_validate(config), reference)


ONE_RANK = Mesh(Layout(), Place(0, 0, 0, 0), None, ALONE, ALONE, ALONE, ALONE)
"""Of a process that has no others, and a model that is not sharded."""


class Stream:
    """Micro-batches as one plain iterable: Lightning takes a list for a collection of loaders."""

    def __init__(self, batches: Iterable[PackedBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[PackedBatch]:
        return iter(self.batches)


class Recorder(pl.Callback):
    """What Lightning is about to step with."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.measures: list[dict[str, float]] = []

    @property
    def losses(self) -> list[float]:
        return [measures["loss"] for measures in self.measures]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.model.named_parameters()})
        self.measures.append(pl_module.step_measures())


def make_module(model: Any, seed: int = 7, lr: float = 0.0, **keywords: Any) -> TrainModule:
    """A module whose steps change nothing, unless ``lr`` says so."""
    return TrainModule(
        model,
        keywords.pop("task", Task(clm, clm, is_uniform=True)),
        lambda m: torch.optim.SGD(m.parameters(), lr=lr),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        head=keywords.pop("head") if "head" in keywords else find_head(model),
        mesh=keywords.pop("mesh", ONE_RANK),
        seed=seed,
        **keywords,
    )


def run(
    module: TrainModule, batches: Iterable[PackedBatch], accumulation: int, steps: int = 1, **keywords: Any
) -> Recorder:
    """Take steps of ``accumulation`` micro-batches each."""
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulation,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **keywords,
    )
    trainer.fit(module, Stream(batches))
    return recorder


def gradient_error(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest over parameters of |g - g'| / max(|g|, 1e-3 of the largest norm), in 2-norms; NaN where one is."""
    names = list(wanted)
    norms = torch.stack([wanted[name].norm() for name in names])
    errors = torch.stack([(got[name] - wanted[name]).norm() for name in names])
    return (errors / norms.clamp(min=1e-3 * norms.max().item())).max().item()  # Python's max may pass over a NaN
