"""What run.yaml may say. Every key is data: a number, a name or a path; nothing here names a class or runs code."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import AfterValidator, ConfigDict, Discriminator, Tag

from llmt_shared.config import Count, StrictModel, UserPath, parse_count, tag_of

_DURATION = re.compile(r"(?P<share>[0-9]+(?:\.[0-9]+)?) ?%|(?P<tokens>.*\S) ?tokens")
_DURATION_WANTED = "wanted a number of steps, a share of the run such as 3%, or an amount such as 100M tokens"


def _duration(value: int | str) -> int | str:
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"found {value}; {_DURATION_WANTED}")
        return value
    match = _DURATION.fullmatch(value)
    if match is None or (match["share"] and float(match["share"]) > 100):
        raise ValueError(f"found {value!r}; {_DURATION_WANTED}")
    if match["tokens"]:
        parse_count(match["tokens"])
    return value


Duration = Annotated[int | str, AfterValidator(_duration)]
"""Optimizer steps; a share of the run's steps, as `3%`; or tokens consumed, as `100M tokens`."""

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


class ClmConfig(StrictModel):
    """Next-token prediction, for tasks pretrain and sft."""

    model_config = ConfigDict(allow_inf_nan=False)

    z_loss: Annotated[float, Ge(0)] = 0.0
    """Factor of the squared log of the softmax's normaliser (PaLM: 1e-4); 0 is none."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of each target that is spread evenly over the vocabulary; 0 is none."""
    neftune: Annotated[float, Ge(0)] = 0.0
    """Noise on the embeddings (alpha of NEFTune, 5 to 15), scaled by each document's own length; 0 is none."""


class DpoConfig(StrictModel):
    """Direct preference optimisation, for task dpo."""

    model_config = ConfigDict(allow_inf_nan=False)

    loss: Literal["sigmoid", "robust", "ipo"] = "sigmoid"
    """robust corrects for `label_smoothing` flipped pairs, where sigmoid becomes conservative DPO."""
    beta: Annotated[float, Gt(0)] = 0.1
    """How strongly the policy is held to the reference; ipo aims at a margin of 1 / (2 beta)."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """Share of pairs that are expected to be the wrong way round."""
    length_normalised: bool = False
    """Divide each side's log-ratio by its number of targets, as TRL's ipo and sigmoid_norm do."""
    reference: Literal["model", "precomputed", "none"] = "model"
    """model: the model as it is loaded, kept beside the one that trains (with `lora`, the same without its adapters).
    precomputed: what `llmt-train ref` wrote beside the dataset. none: reference-free."""
    sft_weight: Annotated[float, Ge(0)] = 0.0
    """Factor of the chosen answers' mean negative log-likelihood, added to the loss; 0 is none."""

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[str]:
        """IPO has no term that smoothing could change."""
        if given.get("loss") == "ipo" and given.get("label_smoothing"):
            yield "label_smoothing means nothing to loss ipo; remove it, or choose sigmoid or robust"


class OrpoConfig(StrictModel):
    """Odds-ratio preference optimisation, for task orpo; needs no reference."""

    model_config = ConfigDict(allow_inf_nan=False)

    beta: Annotated[float, Gt(0)] = 0.1
    """Factor of the odds-ratio term (lambda in the paper)."""
    nll_on: Literal["response", "all"] = "response"
    """What the likelihood term is a mean over: chosen answers, or chosen prompts and answers."""


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


class RateConfig(StrictModel):
    """What every optimizer has: a learning rate over the run, weight decay, and a largest gradient."""

    model_config = ConfigDict(allow_inf_nan=False)

    lr: Annotated[float, Gt(0)]
    """Largest learning rate."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Times the learning rate, per step; norms, biases and embeddings are never decayed."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape after the warm-up; wsd (warm-up, stable, decay) stays at `lr` until its `decay` begins."""
    warmup: Duration = 0
    """Over which the learning rate rises linearly to `lr`: steps, a share of the run as `3%`, or `100M tokens`."""
    decay: Duration | None = None
    """wsd only: the last part of the run, over which the rate falls linearly; 20% if not given."""
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
        if given.get("nesterov") and given.get("momentum") == 0:
            yield "nesterov looks ahead by the momentum, which is 0; remove `nesterov`, or give a momentum"


_Beta = Annotated[float, Ge(0), Lt(1)]


class AdamwConfig(RateConfig):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    optimizer: Literal["adamw"] = "adamw"
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square, per step."""
    eps: Annotated[float, Gt(0)] = 1e-8


class MuonConfig(RateConfig):
    """Muon (Jordan et al. 2024) for the matrices of hidden layers, AdamW for everything else.

    Its updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one `lr` serves both.
    """

    optimizer: Literal["muon"]
    momentum: _Beta = 0.95
    """Decay of the running sum of gradients that is orthogonalised, per step."""
    nesterov: bool = True
    """Orthogonalise the gradient plus the momentum's next value."""
    ns_steps: PositiveInt = 5
    """Newton-Schulz iterations."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    """Of the AdamW part."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Of the AdamW part."""


class AdafactorConfig(RateConfig):
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235): hardly any state; no momentum."""

    optimizer: Literal["adafactor"]


class SgdConfig(RateConfig):
    """Stochastic gradient descent with momentum; its weight decay is added to the gradient."""

    optimizer: Literal["sgd"]
    momentum: _Beta = 0.9
    """Decay of the running sum of gradients, per step; 0 is none, and needs no state."""
    nesterov: bool = False
    """Look ahead by the momentum."""


OptimConfig = Annotated[
    Annotated[AdamwConfig, Tag("adamw")]
    | Annotated[MuonConfig, Tag("muon")]
    | Annotated[AdafactorConfig, Tag("adafactor")]
    | Annotated[SgdConfig, Tag("sgd")],
    Discriminator(lambda given: tag_of(given, "optimizer", "adamw")),
]
"""The optimizer, by its key `optimizer`: adamw where there is none."""


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


_SECTIONS = {
    "clm": (("pretrain", "sft"), ClmConfig()),
    "dpo": (("dpo",), DpoConfig()),
    "orpo": (("orpo",), OrpoConfig()),
}
"""Keys of a run that mean something to some tasks only: these tasks, and the defaults."""


class RunConfig(StrictModel):
    """The whole of run.yaml. Paths are relative to the working directory."""

    task: Literal["pretrain", "sft", "dpo", "orpo"]
    """Loss: next-token prediction on every token of every document (pretrain) or on the targets of chats (sft);
    preference pairs by dpo or orpo. It must fit the dataset's kind."""
    model: Model
    """Hugging Face folder or hub id, or `{from_config: {model_type: ..., ...}}` for fresh weights."""
    data: UserPath
    """Dataset: the `output` of `llmt-prep pack`."""
    output: UserPath
    """Folder of this run: checkpoints, metrics.jsonl, tokenizer. Running again resumes from here."""
    batch: BatchConfig
    train: TrainConfig
    optim: OptimConfig
    clm: ClmConfig = ClmConfig()
    """Of tasks pretrain and sft."""
    dpo: DpoConfig = DpoConfig()
    """Of task dpo."""
    orpo: OrpoConfig = OrpoConfig()
    """Of task orpo."""
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
        """Settings of another task; a run keeps out of its dataset, which is read-only."""
        task = given.get("task")
        for section, (tasks, default) in _SECTIONS.items():
            value = given.get(section, default)
            all_set = default.model_dump() | dict(value) if isinstance(value, Mapping) else value
            # A saved config has every section, with its defaults.
            is_set = all_set not in (default, default.model_dump())
            if is_set and isinstance(task, str) and task not in tasks:
                yield f"{section}: belongs to task {' and '.join(tasks)}, not to {task}; remove `{section}`"
        data, output = given.get("data"), given.get("output")
        if isinstance(data, str | Path) and isinstance(output, str | Path):
            dataset, run = Path(data).resolve(), Path(output).resolve()
            if run == dataset or dataset in run.parents:
                yield f"output {output} lies in the dataset {data}; wanted a folder of its own"
