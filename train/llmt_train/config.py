"""What run.yaml may say. Every key is data: a number, a name or a path; nothing here names a class or runs code."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import AfterValidator, ConfigDict, Discriminator, Tag

from llmt_shared.config import Count, StrictModel, UserPath


def _steps_or_share(value: int | str) -> int | str:
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"found {value}; wanted steps >= 0, or a share of the run such as 3%")
        return value
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?%", value)
    if match is None or float(match[1]) > 100:
        raise ValueError(f"found {value!r}; wanted a number of steps, or a share of the run such as 3%")
    return value


Steps = Annotated[int | str, AfterValidator(_steps_or_share)]
"""Optimizer steps, or a share of the run's steps written as `3%`."""

PositiveInt = Annotated[int, Gt(0)]


class FromConfig(StrictModel):
    """A model with fresh weights."""

    from_config: Annotated[dict[str, Any], MinLen(1)]
    """`model_type` and keys of that family's config; the vocabulary size and token ids left out are the dataset's."""


Model = Annotated[
    Annotated[str, MinLen(1), Tag("text")] | Annotated[FromConfig, Tag("fresh")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "fresh"),
]


class BatchConfig(StrictModel):
    """How many rows one optimizer step and one forward pass take."""

    tokens: Annotated[Count, Gt(0)]
    """Tokens of an optimizer step, padding included: a multiple of the dataset's row length."""
    micro_rows: PositiveInt = 1
    """Rows of one forward and backward pass; more use more memory. The step's rows need not divide by it."""


class TrainConfig(StrictModel):
    """How long to train, and the seed of everything random in training."""

    model_config = ConfigDict(allow_inf_nan=False)

    epochs: Annotated[float, Gt(0)] | None = None
    """Passes over the training rows; excludes `steps`."""
    steps: PositiveInt | None = None
    """Optimizer steps; excludes `epochs`."""
    seed: Annotated[int, Ge(0), Lt(1 << 53)] = 42
    """Decides the order of rows, fresh weights and dropout."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits on every run, which are slower. On a CPU they always do."""

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[str]:
        """One of the two lengths, and only one."""
        if (given.get("epochs") is None) == (given.get("steps") is None):
            yield "wanted one of `epochs` and `steps`"


class OptimConfig(StrictModel):
    """AdamW (Loshchilov and Hutter 2019) and its learning rate over the run."""

    model_config = ConfigDict(allow_inf_nan=False)

    lr: Annotated[float, Gt(0)]
    """Largest learning rate."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square, per step."""
    eps: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Times the learning rate, per step; norms, biases and embeddings are never decayed."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape after the warm-up; wsd (warm-up, stable, decay) stays at `lr` until its `decay` begins."""
    warmup: Steps = 0
    """Steps (or share of the run) over which the learning rate rises linearly to `lr`."""
    decay: Steps | None = None
    """wsd only: the last steps (or share of the run), over which the rate falls linearly; 20% if not given."""
    min_lr: Annotated[float, Ge(0)] = 0.0
    """Learning rate that the schedule falls to at the end of the run."""
    clip: Annotated[float, Gt(0)] | None = 1.0
    """Largest 2-norm of the whole gradient; a larger one is scaled down to it. `null` never clips."""

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[str]:
        """Keys that make sense only together."""
        lr, min_lr, schedule = given.get("lr"), given.get("min_lr"), given.get("schedule", "cosine")
        if isinstance(lr, int | float) and isinstance(min_lr, int | float) and min_lr > lr:
            yield f"min_lr {min_lr} is above lr {lr}; wanted min_lr <= lr"
        if given.get("decay") is not None and schedule != "wsd":
            yield f"decay belongs to schedule wsd, not to {schedule}; remove `decay`"


class EvalConfig(StrictModel):
    """When the validation split is evaluated, per source and in total."""

    every: PositiveInt | None = None
    """Steps between evaluations; there is one before the first step and one after the last in any case."""


class SaveConfig(StrictModel):
    """When checkpoints are written, and how many stay."""

    every: PositiveInt = 500
    """Steps between checkpoints; there is one after the last step in any case."""
    keep: PositiveInt = 3
    """Newest checkpoints that stay on disk."""


class RunConfig(StrictModel):
    """The whole of run.yaml. Paths are relative to the working directory."""

    task: Literal["pretrain", "sft"]
    """Loss: next-token prediction, on every token of every document, or on the targets of chats. It must be the
    dataset's kind."""
    model: Model
    """Hugging Face folder or hub id, or `{from_config: {model_type: ..., ...}}` for fresh weights."""
    data: UserPath
    """Dataset: the `output` of `llmt-prep pack`."""
    output: UserPath
    """Folder of this run: checkpoints, metrics.jsonl, tokenizer. Running again resumes from here."""
    batch: BatchConfig
    train: TrainConfig
    optim: OptimConfig
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the model; weights and optimizer state are fp32 in any case. auto: bf16 on a GPU that has it."""
    attention: Literal["auto", "flash3", "flash2", "varlen", "flex", "sdpa"] = "auto"
    """Attention kernel; auto is the first of these that serves the model on this machine."""
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    log: tuple[Literal["jsonl", "tensorboard"], ...] = ("jsonl",)
    """metrics.jsonl is written always."""

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[str]:
        """A run keeps out of its dataset, which is read-only and has a folder named tokenizer too."""
        data, output = given.get("data"), given.get("output")
        if isinstance(data, str | Path) and isinstance(output, str | Path):
            dataset, run = Path(data).resolve(), Path(output).resolve()
            if run == dataset or dataset in run.parents:
                yield f"output {output} lies in the dataset {data}; wanted a folder of its own"


def resolve_steps(value: int | str, total: int) -> int:
    """Return a number of steps from a number or a share such as ``3%`` of ``total`` steps, rounded."""
    return value if isinstance(value, int) else round(float(value.rstrip("% ")) / 100 * total)
