"""What a run needs of a device's memory, before there is a run.

Weights, gradients and the optimizer's state are counted by parameter. What a micro-batch needs beside them is not
estimated by a formula (such as Korthikanti et al. 2022, arXiv:2205.05198, for one architecture) but counted, operation
by operation, in a dry run of the run's own code on tensors without content: see `dryrun`.

Not counted: what a kernel allocates inside, libraries, what an allocator keeps for later (for all of which
`Device.room` leaves room), and what `train.compile` and `train.liger` save.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from llmt_train.check.dryrun import cpu_attention, fake_copy, gpu_attention, micro_batch, optimizer_step
from llmt_train.config import RunConfig
from llmt_train.data.batch import PackedBatch
from llmt_train.data.rows import AnySplit
from llmt_train.data.stream import Pairing, read_batch
from llmt_train.model.head import likely_head
from llmt_train.optim import build_optimizer
from llmt_train.tasks import build_task


@dataclass(frozen=True)
class Memory:
    """Bytes at the fullest moment of a step, by what they are of."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Of the parameters that train; they are there from the first micro-batch of a step to the end of it."""
    optimizer: int
    """What the optimizer keeps from step to step."""
    reference: int
    """The weights of the reference of dpo, where it is a model of its own."""
    activations: int
    """What the layers of a micro-batch keep for their backward pass, casts of weights included."""
    head: int
    """Logits and their gradients, on top of the activations."""
    working: int
    """What the fullest moment needs beyond all of these: layers that are computed again, or the optimizer's update."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.fixed + self.activations + self.head + self.working

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.reference


def estimate_memory(
    skeleton: Any, config: RunConfig, split: AnySplit, *, device_type: str, autocast: torch.dtype | None
) -> Memory:
    """Return what a run's fullest step needs.

    Args:
        skeleton: the model as it trains, on the meta device: from `load_skeleton`, then `adapt`.
        config: the run.
        split: its training rows; those with the most targets make the micro-batch.
        device_type: ``cpu`` or ``cuda``.
        autocast: compute dtype of the run where it is not that of the parameters.
    """
    batch = fullest_batch(split, config)
    attention = gpu_attention if device_type == "cuda" else cpu_attention
    with fake_copy(skeleton, batch) as (model, fake_batch):
        update = optimizer_step(model, partial(build_optimizer, config=config.optim))
        peaks = micro_batch(
            model, likely_head(model), build_task(config), fake_batch, attention=attention, autocast=autocast
        )
    gradients = sum(_bytes(parameter) for parameter in skeleton.parameters() if parameter.requires_grad)
    scratch = _scratch(update.scratch, gradients, config.optim.optimizer) if device_type == "cuda" else update.scratch
    weights = sum(map(_bytes, [*skeleton.parameters(), *skeleton.buffers()]))
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=update.state,
        reference=weights if _has_reference(config) else 0,
        activations=peaks.kept,
        head=peaks.head,
        working=max(peaks.again, scratch - peaks.kept - peaks.head),
    )


def _scratch(counted: int, gradients: int, optimizer: str) -> int:
    """Of an update on a GPU: AdamW is one kernel; SGD and Adafactor take all parameters at once."""
    return {"adamw": 0, "sgd": gradients, "adafactor": gradients}.get(optimizer, counted)


def _has_reference(config: RunConfig) -> bool:
    return config.task == "dpo" and config.dpo.reference == "model" and config.lora is None


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def fullest_batch(split: AnySplit, config: RunConfig) -> PackedBatch:
    """Return a micro-batch of the rows with the most targets, for they need the most logits.

    Of a large split 16,384 rows are looked at, evenly spread.
    """
    looked_at = np.unique(np.linspace(0, split.num_rows - 1, min(split.num_rows, 16_384)).astype(np.int64))
    most_first = looked_at[np.argsort(-split.targets(looked_at).astype(np.int64), kind="stable")]
    rows = np.resize(most_first, config.batch.micro_rows)  # a split of fewer rows gives some again
    ones = dict.fromkeys(("targets", "pairs", "chosen_targets", "chosen_labels"), 1.0)
    return read_batch(split, rows, ones, Pairing(config.task == "orpo" and config.orpo.nll_on == "all"))


def gigabytes(size: float) -> str:
    """Return a size as a person reads it."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
