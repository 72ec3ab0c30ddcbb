"""A model with its weights, from a folder, the hub or a config; and what is done with one, whatever it is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llmt_train.attention import Backend, Segments
from llmt_train.data.batch import PackedBatch, Text, pack_texts
from llmt_train.model.fill import fill, materialise
from llmt_train.model.skeleton import load_skeleton, vocab_size
from llmt_train.parallel.collectives import gather_same
from llmt_train.parallel.context import WHOLE, TokenSplit

__all__ = ["evaluating", "forward_hidden", "load_model", "load_skeleton", "vocab_size", "whole_logits"]


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
    """Return what the output layer reads: the decoder's last hidden states, [N, H], of the tokens that this rank has.

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


@torch.no_grad()
def whole_logits(
    model: Any,
    texts: Sequence[Text],
    *,
    device: torch.device | str | None = None,
    attention: Backend = "auto",
    deterministic: bool = False,
    split: TokenSplit = WHOLE,
) -> Tensor:
    """Return the model's own logits of texts packed into one row, the same on every rank: [N, V], N tokens together.

    Args:
        model: from `load_model`; if it is cut over devices, all its ranks call this.
        texts: tokens of each; any number.
        device: where the model computes; ``None`` is where its embeddings lie.
        attention: backend of the attention, or ``auto``.
        deterministic: see `varlen_attention`.
        split: ranks that share the model's layers and tokens.
    """
    place = model.get_input_embeddings().weight.device if device is None else device
    batch = pack_texts(texts, split).to(place)
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        segments=batch.segments(attention, deterministic),
        use_cache=False,
    )
    return gather_same(output.logits[0], split.cp, 0)[: sum(len(text) for text in texts)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets back the mode it had.

    Sharded weights that the last forward pass gathered are let go of: no backward pass comes that would do it.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
            if isinstance(module, FSDPModule):
                module.reshard()
