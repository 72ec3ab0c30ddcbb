"""The door to transformers: models built with ``attn_implementation="llmt"`` attend through `varlen_attention`.

The segments travel as the keyword ``segments`` of the model's forward. What this function cannot do it refuses: an
attention that silently ignored the segments would train on documents that see each other.

Under context parallel what comes is this rank's tokens, and the segments are those of all ranks' together.

Shape legend: N packed tokens, H query heads, K key/value heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from llmt_shared.errors import ConfigError
from llmt_train.attention.choose import varlen_attention
from llmt_train.attention.segments import Segments
from llmt_train.parallel.context import attend_by_heads

NAME = "llmt"
"""Name of this attention in transformers' registers."""


def register() -> None:
    """Make ``attn_implementation="llmt"`` known to transformers; calling it again changes nothing."""
    # Where segments lie is data: a compiler would make code for every row of it.
    AttentionInterface.register(NAME, torch.compiler.disable(attend))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(NAME, _no_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: query [1, H, N, D], key and value [1, K, N, D] to [1, N, H, D] and no weights.

    Raises:
        ConfigError: no segments came; the layer is not causal; it brings a mask or a bias of its own.
        ValueError: a batch of more than one row.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _check(type(module).__name__, segments, bool(causal), attention_mask, position_bias)
    assert segments is not None  # `_check` raises
    if query.shape[0] != 1:
        raise ValueError(f"a batch of {query.shape[0]} rows; a micro-batch is one row, its segments laid end to end")

    def attention(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, sinks_H: Tensor | None) -> Tensor:
        return varlen_attention(
            q_NHD,
            k_NKD,
            v_NKD,
            segments,
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=sinks_H,
            dropout=dropout,
            backend=segments.backend,
            deterministic=segments.deterministic,
        )

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend_by_heads(attention, q, k, v, s_aux, segments.cp).unsqueeze(0), None


def _check(
    layer: str, segments: Segments | None, causal: bool, attention_mask: Tensor | None, position_bias: Tensor | None
) -> None:
    if segments is None:
        raise ConfigError(
            f"{layer}: packed attention was called without segments; pass `segments=batch.segments()` to the model's "
            "forward (a model that does not hand keywords on to its attention cannot train on packed rows)"
        )
    if not causal:
        raise ConfigError(f"{layer}: is not causal; packed training needs causal attention")
    if attention_mask is not None or position_bias is not None:
        extra = "an attention mask" if attention_mask is not None else "a position bias"
        raise ConfigError(f"{layer}: brings {extra} of its own; packed attention has no place for it")


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask that transformers asks for: none, for the segments say it all."""
