"""Where the model comes from, and what is changed of it before it trains."""

import re
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Tag

from llmt_shared.config import PositiveInt, StrictModel


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"found {text!r}, which is no regular expression: {error}") from None
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


class FromConfig(StrictModel):
    """A model with fresh weights."""

    from_config: Annotated[dict[str, Any], MinLen(1)]
    """`model_type` and keys of that family's config; the vocabulary size and token ids left out are the dataset's."""


Model = Annotated[
    Annotated[str, MinLen(1), Tag("text")] | Annotated[FromConfig, Tag("fresh")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "fresh"),
]


class CheckpointingConfig(StrictModel):
    """What the backward pass computes again instead of keeping it: less memory for more arithmetic."""

    policy: Literal["none", "attention", "selective", "full"] = "none"
    """none keeps everything; selective keeps what attention and every second matrix product give; attention keeps
    what attention gives; full keeps only the input of a layer."""
    every: PositiveInt = 1
    """Layers of which one is treated so: 1 is every layer, 2 every second one."""


Checkpointing = Annotated[
    CheckpointingConfig,
    BeforeValidator(
        lambda value: {"policy": value} if isinstance(value, str) else value,
        json_schema_input_type=Literal["none", "attention", "selective", "full"] | CheckpointingConfig,
    ),
]
"""A policy, or `{policy: selective, every: 2}`."""


class LoraConfig(StrictModel):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) train beside a model that stays as it is; needs `peft`."""

    model_config = ConfigDict(allow_inf_nan=False)

    rank: PositiveInt = 16
    """Of the update of each matrix."""
    alpha: Annotated[float, Gt(0)] = 32.0
    """The update is scaled by alpha / rank; with `rank_stabilised` by alpha / sqrt(rank)."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability of dropping an input of an adapter, in training."""
    rank_stabilised: bool = False
    """Kalajdzievski 2023, arXiv:2312.03732."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], MinLen(1)] = "all-linear"
    """Names of the layers that get an adapter, such as [q_proj, v_proj]; all-linear: all but the output layer."""
    train_also: tuple[Pattern, ...] = ()
    """Regular expressions: parameters of the model itself that train too, such as [embed_tokens]."""
