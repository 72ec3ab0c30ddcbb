"""From hidden states to the log-probability of every label, without ever holding all logits.

The logits of a chunk of tokens exist for a moment; the backward pass makes them again. Unlike kernels that compute
the gradient of a cross-entropy in the forward pass, this takes any gradient per token, so all objectives share it.

Shape legend: N packed tokens, T tokens that have a label, C tokens of a chunk, H hidden size, V vocabulary.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmt_shared.segments import IGNORE
from llmt_train.attention import Segments
from llmt_train.batch import PackedBatch
from llmt_train.models import evaluating, forward_hidden

CHUNK = 1024
"""Tokens whose logits are held at a time."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest difference of log-probabilities as a share of the largest one; in half precision it is the rounding of the
model's own logits, a hundred times below what a wrong factor makes."""


@dataclass(frozen=True, eq=False)
class HeadSpec:
    """How a model makes logits of hidden states: ``cap(scale * (hidden @ weight.T + bias))``."""

    linear: nn.Linear
    """The output layer itself: whoever wraps or shards its parameters, they are read where they are used."""
    scale: float = 1.0
    """Cohere's ``logit_scale``, one over Granite's ``logits_scaling``."""
    softcap: float | None = None
    """c of ``c * tanh(logits / c)`` (Gemma's ``final_logit_softcapping``); ``None`` is no cap."""


def model_logps(
    model: Any,
    head: HeadSpec | None,
    batch: PackedBatch,
    *,
    attention: str = "auto",
    deterministic: bool = False,
    chunk: int = CHUNK,
) -> Tensor:
    """Run the model on a micro-batch and return the log-probability of every label: [N], 0 where there is none.

    Args:
        model: a causal language model of transformers with packed attention.
        head: as `find_head` found it; ``None`` computes the model's own logits of the labelled tokens, all at once.
        batch: the micro-batch; one without labels gives zeros that still depend on every parameter used.
        attention: backend of the attention, or ``auto``.
        deterministic: see `varlen_attention`.
        chunk: tokens whose logits are held at a time.
    """
    labels = batch.labels[0]
    segments = batch.segments(attention, deterministic)
    if head is not None:
        return token_logps(forward_hidden(model, batch, segments), head, labels, chunk)
    kept = _labelled(labels)
    logits_TV = _own_logits(model, batch, segments, kept)
    return _scatter(_gather_logps(logits_TV, labels[kept]), kept, labels)


def token_logps(hidden: Tensor, head: HeadSpec, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return the log-probability of each label: [N], in at least fp32, 0 where the label is -100.

    Args:
        hidden: [N, H]. The product with the weights runs in its dtype (under autocast, in that one's), as in the
            model's own head; everything after it in fp32, or in fp64 where that is the dtype.
        head: the output layer.
        labels: [N] int64. Tokens without a label never reach the head.
        chunk: tokens whose logits are held at a time.
    """
    kept = _labelled(labels)
    linear = head.linear
    arguments = (hidden[kept], linear.weight, linear.bias, labels[kept], head.scale, head.softcap, chunk)
    logps_T = cast("Tensor", _TokenLogps.apply(*arguments))  # type: ignore[no-untyped-call]
    return _scatter(logps_T, kept, labels)


def find_head(model: Any) -> HeadSpec | None:
    """Find how a model makes its logits, and prove it on hidden states large enough to show a cap or a factor.

    Returns:
        What `check_head` agrees with; ``None``, with a warning, where nothing does: then the model's own logits serve,
        right but not chunked.
    """
    candidates = list(_candidates(model))
    for head in candidates:
        if check_head(model, head):
            return head
    warnings.warn(
        f"{model.config.model_type}: its logits are not a linear layer of the hidden states with a known factor or "
        "cap; the logits of all targets of a micro-batch are held at once, which needs more memory",
        stacklevel=2,
    )
    return None


@torch.no_grad()
def check_head(model: Any, head: HeadSpec) -> bool:
    """Return whether the head gives the log-probabilities of the model's own logits, on random hidden states."""
    weight = head.linear.weight
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(16, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    # Logits of about 20: far into the bend of a cap (30 is usual), whatever the scale of the weights.
    probe = probe * (20 / F.linear(probe, weight).float().std().clamp(min=1e-6)).to(probe.dtype)
    labels = torch.randint(weight.shape[0], (16,), generator=generator).to(weight.device)
    wanted = _gather_logps(_logits_of(model, probe), labels)
    found = token_logps(probe, head, labels)
    error = (wanted - found).abs().max() / wanted.abs().max()
    return bool(error <= _TOLERANCE[weight.dtype])


def _candidates(model: Any) -> Iterator[HeadSpec]:
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear) or model.get_decoder() is model:
        return
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value not in (0, 1):
            scales += [1 / value, float(value)]  # Granite divides by what HyperCLOVA X multiplies with
    for scale in scales:
        yield HeadSpec(linear, scale, softcap)


def _logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits that the model itself makes of given hidden states: [N, H] to [N, V]. They replace its decoder's."""

    def replace(module: nn.Module, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = hidden[None]
        return output

    n = hidden.shape[0]
    ids = torch.zeros(1, n, dtype=torch.int64, device=hidden.device)
    segments = Segments.from_lengths([n], hidden.device)
    with evaluating(model):
        handle = model.get_decoder().register_forward_hook(replace)
        try:
            output = model(input_ids=ids, position_ids=torch.arange(n, device=ids.device)[None], segments=segments)
        finally:
            handle.remove()
    return cast("Tensor", output.logits[0])


def _own_logits(model: Any, batch: PackedBatch, segments: Segments, kept: Tensor) -> Tensor:
    """[T, V] of the tokens at ``kept``; models that cannot leave out tokens give all, which are then cut."""
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        segments=segments,
        use_cache=False,
        logits_to_keep=kept,
    )
    logits: Tensor = output.logits[0]
    return logits if logits.shape[0] == kept.shape[0] else logits[kept]


def _labelled(labels: Tensor) -> Tensor:
    return (labels != IGNORE).nonzero()[:, 0]


def _scatter(logps_T: Tensor, kept: Tensor, labels: Tensor) -> Tensor:
    return logps_T.new_zeros(labels.shape[0]).index_put((kept,), logps_T)


def _gather_logps(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    logits_TV = logits_TV.to(_at_least_fp32(logits_TV.dtype))
    return logits_TV.log_softmax(-1).gather(1, labels_T[:, None])[:, 0]


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _TokenLogps(torch.autograd.Function):
    """The chunked head: [T, H] and [T] labels to [T]; keeps the log-sum-exp, makes the logits again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        device = hidden_TH.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TH.dtype
        ctx.scale, ctx.softcap, ctx.chunk = scale, softcap, chunk
        lse_T = hidden_TH.new_empty(hidden_TH.shape[0], dtype=_at_least_fp32(ctx.dtype))
        logps_T = torch.empty_like(lse_T)
        with torch.autocast(device, enabled=False):
            weight, bias = _cast(weight_VH, bias_V, ctx.dtype)
            for part in _parts(hidden_TH.shape[0], chunk):
                logits_CV = _chunk_logits(hidden_TH[part].to(ctx.dtype), weight, bias, scale, softcap)
                lse_T[part] = logits_CV.logsumexp(-1)
                logps_T[part] = logits_CV.gather(1, labels_T[part, None])[:, 0] - lse_T[part]
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, labels_T, lse_T)
        return logps_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, bias_V, labels_T, lse_T = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden_TH) if wants_hidden else None
        # Summed over chunks in fp32: bf16 would lose the small ones.
        grad_weight = torch.zeros_like(weight_VH, dtype=lse_T.dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=lse_T.dtype) if wants_bias else None
        with torch.autocast(hidden_TH.device.type, enabled=False):
            weight, bias = _cast(weight_VH, bias_V, ctx.dtype)
            for part in _parts(hidden_TH.shape[0], ctx.chunk):
                hidden_CH = hidden_TH[part].to(ctx.dtype)
                logits_CV = _chunk_logits(hidden_CH, weight, bias, ctx.scale, ctx.softcap)
                grad_CV = _logits_grad(logits_CV, lse_T[part], labels_T[part], grad_T[part], ctx.scale, ctx.softcap)
                if grad_bias is not None:
                    grad_bias += grad_CV.sum(0)
                grad_CV = grad_CV.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (grad_CV @ weight).to(grad_hidden.dtype)
                if grad_weight is not None:
                    grad_weight += grad_CV.T @ hidden_CH
        return (grad_hidden, _like(grad_weight, weight_VH), _like(grad_bias, bias_V), None, None, None, None)


def _chunk_logits(
    hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    logits = F.linear(hidden_CH, weight_VH, bias_V).to(_at_least_fp32(hidden_CH.dtype))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _logits_grad(
    logits_CV: Tensor, lse_C: Tensor, labels_C: Tensor, grad_C: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Gradient with respect to ``hidden @ weight.T + bias``: (one at the label) - softmax, then the cap's slope."""
    grad = (logits_CV - lse_C[:, None]).exp_().neg_()
    grad[torch.arange(len(labels_C), device=labels_C.device), labels_C] += 1
    grad *= grad_C[:, None] * scale
    if softcap is not None:
        grad *= 1 - (logits_CV / softcap) ** 2
    return grad


def _parts(size: int, chunk: int) -> Iterator[slice]:
    return (slice(first, first + chunk) for first in range(0, size, chunk))


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)
