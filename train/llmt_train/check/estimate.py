"""What a run needs of a device's memory, before there is a run.

Nothing is estimated by a formula (such as Korthikanti et al. 2022, arXiv:2205.05198, for one architecture): the model
is laid out over devices and steps as in the run, by the run's own code, and what one rank holds of it is counted,
operation by operation, on tensors without content: see `dryrun`.

Not counted: what a kernel allocates inside, libraries, what an allocator keeps for later (for all of which
`Device.room` leaves room), and what `train.compile` and `train.liger` save.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llmt_train.attention import Backend
from llmt_train.check.dryrun import (
    Peaks,
    StepPeaks,
    cpu_attention,
    gpu_attention,
    laid_out_copy,
    micro_batch,
    optimizer_step,
    warm_up,
)
from llmt_train.check.livebytes import storage_of
from llmt_train.check.pretend import as_rank
from llmt_train.config import RunConfig
from llmt_train.data.batch import PackedBatch, shard_tokens
from llmt_train.data.rows import AnySplit
from llmt_train.data.stream import Pairing, plan_run, read_batch
from llmt_train.model.head import likely_head
from llmt_train.optim import build_optimizer
from llmt_train.parallel.layout import Layout, Place, rank_of
from llmt_train.parallel.mesh import Mesh
from llmt_train.policy import split_of
from llmt_train.tasks import build_task


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step, by what they are of."""

    weights: int
    """Parameters, of which a device holds its part, and buffers."""
    gradients: int
    """Of the parameters that train; they are there from the first micro-batch of a step to the end of it."""
    optimizer: int
    """What the optimizer keeps from step to step."""
    reference: int
    """The reference of dpo, where it is a model of its own: its weights."""
    activations: int
    """What the layers of a micro-batch keep for their backward pass."""
    exchanged: int
    """What is there because parameters lie in parts, or in another dtype than is computed in: layers that are whole
    while they are computed, all that lies outside them, buffers for parameters that come and gradients that leave."""
    head: int
    """Logits and their gradients, on top of the activations."""
    working: int
    """What the fullest moment needs beyond all of these: layers that are computed again, or the optimizer's update."""
    host: int = 0
    """With ``parallel.offload``, what lies in the host's memory instead; no part of the total."""

    @property
    def total(self) -> int:
        """All of it that is on the device."""
        return self.fixed + self.activations + self.exchanged + self.head + self.working

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.reference


class _Counted(NamedTuple):
    """What one rank was seen to hold."""

    parameters: int
    buffers: int
    gradients: int
    """Its parts of them."""
    largest: int
    """Its parts of the parameters that are gathered together: of the most."""
    update: StepPeaks
    peaks: Peaks


def estimate_memory(
    skeleton: Any,
    config: RunConfig,
    split: AnySplit,
    *,
    device_type: str,
    compute: torch.dtype | None,
    layout: Layout,
) -> Memory:
    """Return what a run's fullest step needs of each device.

    Args:
        skeleton: the model as it trains, on the meta device: from `load_skeleton`, then `adapt_skeleton`.
        config: the run.
        split: its training rows; those with the most targets make the micro-batch.
        device_type: ``cpu`` or ``cuda``.
        compute: dtype of the run's arithmetic where it is not that of the parameters.
        layout: of its processes.

    Raises:
        ConfigError: the model cannot be laid out so.
    """
    plan = plan_run(split, config.batch, config.train, layout.dp)
    batch = fullest_batch(split, config, plan.micro_rows)
    exchanges_once = config.parallel.no_sync and plan.accumulation > 1
    counted = as_rank(
        layout,
        _fullest_rank(batch, layout),
        partial(
            _count,
            skeleton=skeleton,
            config=config,
            batch=batch,
            compute=compute,
            attention=gpu_attention if device_type == "cuda" else cpu_attention,
            exchanges_once=exchanges_once,
        ),
    )
    memory = _memory(counted, config, device_type, exchanges_once)
    return _offloaded(memory, counted) if config.parallel.offload and device_type == "cuda" else memory


def _fullest_rank(batch: PackedBatch, layout: Layout) -> int:
    """Of those that share tokens, the one whose tokens have the most labels."""
    parts = batch.label_places.numpy() * layout.cp // batch.input_ids.shape[1]
    return rank_of(layout, Place(0, 0, int(np.bincount(parts, minlength=1).argmax()), 0))


def _count(
    mesh: Mesh,
    *,
    skeleton: Any,
    config: RunConfig,
    batch: PackedBatch,
    compute: torch.dtype | None,
    attention: Backend,
    exchanges_once: bool,
) -> _Counted:
    tokens = split_of(config, mesh)
    own = shard_tokens(batch, tokens)
    with laid_out_copy(skeleton, own, mesh, sp=tokens.sp, compute=compute) as (model, fake_batch):
        warm_up(model)  # parts of equal size are made for all ranks
        parameters = list(model.parameters())
        return _Counted(
            parameters=_held(parameters),
            buffers=_held(model.buffers()),
            gradients=_held(parameter for parameter in parameters if parameter.requires_grad),
            largest=max(map(_held, _groups(model))),
            update=optimizer_step(model, partial(build_optimizer, config=config.optim)),
            peaks=micro_batch(
                model,
                likely_head(model, tokens),
                build_task(config),
                fake_batch,
                attention=attention,
                exchanges_once=exchanges_once,
            ),
        )


def _memory(counted: _Counted, config: RunConfig, device_type: str, exchanges_once: bool) -> Memory:
    update, peaks = counted.update, counted.peaks
    scratch = _scratch(update.scratch, counted.gradients, config.optim.optimizer, device_type)
    weights = counted.parameters + counted.buffers
    passes = Memory(
        weights=weights,
        gradients=peaks.waiting if exchanges_once else counted.gradients,
        optimizer=update.state,
        reference=weights if _has_reference(config) else 0,
        activations=peaks.kept,
        exchanged=peaks.exchanged,
        head=peaks.head,
        working=peaks.again,
    )
    then = passes.fixed - passes.gradients + counted.gradients + scratch
    return replace(passes, working=passes.working + max(0, then - passes.total))


def _offloaded(memory: Memory, counted: _Counted) -> Memory:
    """Parts of parameters come from the host in their own dtype; there are the parts of gradients, and the update."""
    has_reference = memory.reference > 0
    return replace(
        memory,
        weights=counted.buffers,
        gradients=counted.peaks.waiting,
        optimizer=0,
        reference=counted.buffers if has_reference else 0,
        exchanged=memory.exchanged + counted.largest,
        working=counted.peaks.again,
        host=counted.parameters * (1 + has_reference) + counted.gradients + memory.optimizer + counted.update.scratch,
    )


def _held(tensors: Iterable[Tensor]) -> int:
    """Bytes that this rank has of them, tied ones once."""
    return sum({id(tensor): storage_of(tensor).nbytes() for tensor in tensors}.values())


def _groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters that FSDP2 makes whole together: those of each layer, and all others."""
    layers = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
    inside = [list(layer.parameters()) for layer in layers]
    ids = {id(parameter) for parameters in inside for parameter in parameters}
    return [*inside, [parameter for parameter in model.parameters() if id(parameter) not in ids]]


def _scratch(counted: int, gradients: int, optimizer: str, device_type: str) -> int:
    """Of an update; on a GPU AdamW is one kernel, and SGD takes all parameters at once."""
    return counted if device_type == "cpu" else {"adamw": 0, "sgd": gradients}.get(optimizer, counted)


def _has_reference(config: RunConfig) -> bool:
    return config.task == "dpo" and config.dpo.reference == "model" and config.lora is None


def fullest_batch(split: AnySplit, config: RunConfig, micro_rows: int) -> PackedBatch:
    """Return a micro-batch of the ``micro_rows`` rows with the most targets, for they need the most logits.

    Of a large split 16,384 rows are looked at, evenly spread.
    """
    looked_at = np.unique(np.linspace(0, split.num_rows - 1, min(split.num_rows, 16_384)).astype(np.int64))
    most_first = looked_at[np.argsort(-split.targets(looked_at).astype(np.int64), kind="stable")]
    rows = np.resize(most_first, micro_rows)  # a split of fewer rows gives some again
    ones = dict.fromkeys(("targets", "pairs", "chosen_targets", "chosen_labels"), 1.0)
    return read_batch(split, rows, ones, Pairing(config.task == "orpo" and config.orpo.nll_on == "all"))


def gigabytes(size: float) -> str:
    """Return a size as a person reads it."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
