"""Where the rows come from: a dataset on disk, or thin air."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, Discriminator, Field, Tag

from llmt_shared.config import Bytes, Count, PositiveInt, StrictModel, UserLocation, UserPath


class SyntheticConfig(StrictModel):
    """Rows of random tokens, to try out speed and memory without shards. Their lengths are log-normal."""

    model_config = ConfigDict(allow_inf_nan=False)

    length: Annotated[Count, Gt(1)]
    """Tokens of a row."""
    rows: PositiveInt = 1024
    """Rows of an epoch."""
    median: Annotated[float, Gt(1)] = 512.0
    """Of the documents' tokens (of a chat's, or of each side of a pair). The last of a row is cut to what is left."""
    sigma: Annotated[float, Ge(0)] = 1.0
    """Of the logarithm of the tokens: 0 makes all documents equally long, 1 is like web text."""
    targets: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of a chat's or an answer's tokens that are targets, at its end; pre-training has no other tokens."""
    vocab_size: PositiveInt | None = None
    """Tokens are drawn below it. Where it is not given it is the model's, and of a `from_config` without one that of
    its family in transformers."""
    held_out: Annotated[int, Ge(0)] = 0
    """Rows of a validation split."""
    seed: Annotated[int, Ge(0), Lt(1 << 53)] = 0
    """Of the tokens and lengths; the order of rows is the run's."""


class FromSynthetic(StrictModel):
    """No dataset."""

    synthetic: SyntheticConfig


def _kind(value: Any) -> str:
    return "synthetic" if isinstance(value, Mapping | FromSynthetic) else "path"


Data = Annotated[
    Annotated[UserLocation, Tag("path")] | Annotated[FromSynthetic, Tag("synthetic")],
    Discriminator(_kind),
]
"""The `output` of `llmt-prep pack`, a folder or URL, or `{synthetic: {length: 4096}}`."""


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmt"


class CacheConfig(StrictModel):
    """Where data below a URL is kept on this machine; the processes of a machine share it, also those of other runs."""

    path: UserPath = Field(default_factory=_cache_folder)
    """Folder on a fast disk of this machine; by default ~/.cache/llmt."""
    size: Annotated[Bytes, Gt(0)] = 64_000_000_000
    """Bytes that the folder never exceeds. It must hold the shards of `train.shuffle_shards`, better twice."""
