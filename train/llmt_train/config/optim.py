"""The optimizer and its learning rate over the run."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, ConfigDict, Discriminator, Tag

from llmt_shared.config import PositiveInt, StrictModel, parse_count, tag_of

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
