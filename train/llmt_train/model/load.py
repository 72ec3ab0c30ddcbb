"""A model with its weights, from a folder, the hub or a config; and what is done with one, whatever it is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmt_train.attention import Segments
from llmt_train.data.batch import PackedBatch
from llmt_train.model.fill import fill, materialise
from llmt_train.model.skeleton import load_skeleton, vocab_size

__all__ = ["evaluating", "forward_hidden", "load_model", "load_skeleton", "vocab_size"]


def load_model(spec: str | Mapping[str, Any], *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a causal language model in training mode on the CPU, its attention keeping segments apart.

    Args:
        spec: a folder or a hub id, whose weights are loaded; or ``{"from_config": {"model_type": .., key: ..}}``,
            whose weights are drawn.
        dtype: of the parameters.
        seed: of the drawn weights; torch's own generator is left as it was.

    Raises:
        ConfigError: no such folder or id; no safetensors, or not of this model; quantized; code of its own; an unknown
            model type or key; values that do not fit together; layers that packed attention has not.
    """
    model = load_skeleton(spec, dtype=dtype)
    materialise(model, "cpu")
    fill(model, spec, seed=seed)
    return model


def forward_hidden(model: Any, batch: PackedBatch, segments: Segments | None = None) -> Tensor:
    """Return what the output layer reads: the decoder's last hidden states, [N, H].

    Args:
        model: from `load_model`.
        batch: the micro-batch.
        segments: those of the batch, with a backend of choice; ``None`` takes the batch's with ``auto``.
    """
    output = model.get_decoder()(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        segments=batch.segments() if segments is None else segments,
        use_cache=False,
    )
    return cast("Tensor", output.last_hidden_state[0])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets back the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
