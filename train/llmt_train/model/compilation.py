"""torch.compile, layer by layer: one layer is compiled once and serves all that are like it."""

from types import MethodType
from typing import Any

import torch

from llmt_train.model.recompute import layers_of


def compile_layers(model: Any) -> None:
    """Compile every layer of a model; attention stays outside, for where segments lie differs from row to row.

    Call it before `recompute`: what is computed again is then compiled too.

    Raises:
        ConfigError: transformers does not tell the model's layers.
    """
    # Code is made apart for training, evaluation and a reference, for each number of rows; torch gives up after 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in layers_of(model, "train.compile"):
        # Rows of one length come in few numbers: a full micro-batch, a short one, an empty one.
        layer.forward = MethodType(torch.compile(layer.forward.__func__, dynamic=False), layer)
