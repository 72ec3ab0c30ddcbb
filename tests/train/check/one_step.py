"""A step of a tiny model over devices, under count: with numbers on ranks that are, without on one that is not.

Both attend to all pieces as one; `test_dryrun` compares that with what pieces need.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from train.tiny_models import CONFIGS, packed

from llmt_train.check.dryrun import (
    Peaks,
    StepPeaks,
    cpu_attention,
    laid_out_copy,
    micro_batch,
    optimizer_step,
    warm_up,
)
from llmt_train.check.livebytes import LiveBytes, storage_of
from llmt_train.check.pretend import as_rank
from llmt_train.config import AdamwConfig, CheckpointingConfig
from llmt_train.config.optim import RateConfig
from llmt_train.data.batch import shard_tokens
from llmt_train.model.fused import split_fused
from llmt_train.model.head import HeadSpec, likely_head
from llmt_train.model.load import load_model, load_skeleton
from llmt_train.model.recompute import recompute
from llmt_train.objectives import clm
from llmt_train.optim import build_optimizer
from llmt_train.parallel.context import TokenSplit
from llmt_train.parallel.layout import Layout
from llmt_train.parallel.mesh import Mesh, build_mesh
from llmt_train.parallel.sharding import shard
from llmt_train.parallel.tensor import tensor_parallel
from llmt_train.tasks import Task

BATCH = packed([[40, 24], [50, 9]], 64)


class Step(NamedTuple):
    """What is to be done, and how."""

    layout: Layout = Layout()
    family: str = "llama"
    sp: bool = True
    compute: torch.dtype | None = None
    policy: str = "none"
    exchanges_once: bool = False
    has_head: bool = True
    optimizer: RateConfig = AdamwConfig(lr=1e-3)
    task: Task = Task(clm, clm, is_uniform=True)
    keys: tuple[tuple[str, Any], ...] = ()
    """Of the model's config, beside those of its family."""

    @property
    def spec(self) -> dict[str, Any]:
        return {"from_config": {"model_type": self.family, **CONFIGS[self.family], **dict(self.keys)}}

    def tokens(self, mesh: Mesh) -> TokenSplit:
        return TokenSplit(mesh.tp, mesh.cp, self.sp and self.layout.tp > 1)


class Found(NamedTuple):
    """Bytes."""

    parameters: int
    whole: int
    """Outside of the layers, while the model runs."""
    peaks: Peaks
    update: StepPeaks


def on_real_ranks(steps: Sequence[Step]) -> list[Found]:
    """With numbers, on a rank that is there; all ranks call it."""
    torch.set_num_threads(1)
    return [with_numbers(step, build_mesh(step.layout, "cpu")) for step in steps]


def with_numbers(step: Step, mesh: Mesh) -> Found:
    """On any rank; on one whose others are not there numbers are what they may be."""
    model = load_model(step.spec)
    split_fused(model)
    tensor_parallel(model, mesh, sp=step.sp)
    shard(model, mesh, compute=step.compute)
    recompute(model, CheckpointingConfig(policy=step.policy))
    return _found(step, model, shard_tokens(BATCH, step.tokens(mesh)), mesh)


def without_numbers(step: Step, rank: int = 0) -> Found:
    """On a rank that is not."""
    skeleton = load_skeleton(step.spec)
    split_fused(skeleton)
    recompute(skeleton, CheckpointingConfig(policy=step.policy))

    def found(mesh: Mesh) -> Found:
        batch = shard_tokens(BATCH, step.tokens(mesh))
        with laid_out_copy(skeleton, batch, mesh, sp=step.sp, compute=step.compute) as (model, fake_batch):
            return _found(step, model, fake_batch, mesh)

    return as_rank(step.layout, rank, found)


def _found(step: Step, model: nn.Module, batch: Any, mesh: Mesh) -> Found:
    warm_up(model)
    head: HeadSpec | None = likely_head(model, step.tokens(mesh)) if step.has_head else None
    return Found(
        sum(storage_of(parameter).nbytes() for parameter in model.parameters()),
        whole_outside_layers(model),
        micro_batch(model, head, step.task, batch, attention=cpu_attention, exchanges_once=step.exchanges_once),
        optimizer_step(model, partial(build_optimizer, config=step.optimizer)),
    )


def whole_outside_layers(model: nn.Module) -> int:
    """Return the bytes of what FSDP2 makes whole with the model itself, not with one of its layers."""
    warm_up(model)
    if not isinstance(model, FSDPModule):
        return 0
    with LiveBytes() as counter:
        model.unshard()
        size = counter.live
        model.reshard()
    return size
