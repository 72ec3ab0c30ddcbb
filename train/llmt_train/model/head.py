"""From hidden states to the log-probability of every label, without ever holding all logits.

The logits of a chunk of tokens exist for a moment; the backward pass makes them again, for it takes any gradient per
token, so that all objectives share it. A loss that weighs all labels alike needs no second time: its gradients are
made, up to that weight, while the logits are there (the idea of Liger Kernel's fused cross-entropy, Hsu et al. 2024,
arXiv:2410.10989).

Shape legend: N packed tokens, T tokens that have a label, C tokens of a chunk, H hidden size, V vocabulary.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmt_train.attention import Backend, Segments
from llmt_train.data.batch import PackedBatch
from llmt_train.model.load import evaluating, forward_hidden

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


class Scores(NamedTuple):
    """What a model thinks of every label: [N] each, 0 where there is no label; in at least fp32."""

    logps: Tensor
    """Log-probability of the label."""
    lse: Tensor
    """Logarithm of the sum of the exponentials of all logits."""
    mean_logps: Tensor | None
    """Mean log-probability over the vocabulary; ``None`` where it was not asked for."""


def model_scores(
    model: Any,
    head: HeadSpec | None,
    batch: PackedBatch,
    *,
    attention: Backend = "auto",
    deterministic: bool = False,
    with_mean: bool = False,
    is_uniform: bool = False,
    chunk: int = CHUNK,
) -> Scores:
    """Run the model on a micro-batch and score every label.

    Args:
        model: a causal language model of transformers with packed attention.
        head: as `find_head` found it; ``None`` computes the model's own logits of the labelled tokens, all at once.
        batch: the micro-batch; one without labels gives zeros that still depend on every parameter used.
        attention: backend of the attention, or ``auto``.
        deterministic: see `varlen_attention`.
        with_mean: whether ``mean_logps`` is wanted (label smoothing is all that needs it).
        is_uniform: whether the loss is the sum of the log-probabilities times one number; see `token_scores`.
        chunk: tokens whose logits are held at a time.
    """
    segments = batch.segments(attention, deterministic)
    if head is not None:
        hidden = forward_hidden(model, batch, segments)
        labels, places = batch.labels[0], batch.label_places
        return token_scores(hidden, head, labels, places, with_mean=with_mean, is_uniform=is_uniform, chunk=chunk)
    kept = batch.label_places
    logits_TV = _own_logits(model, batch, segments, kept)
    return _scatter(_scores_of(logits_TV, batch.labels[0][kept], with_mean), kept, batch.labels.shape[1])


def logits_at(model: Any, head: HeadSpec | None, batch: PackedBatch, segments: Segments, places: Tensor) -> Tensor:
    """Return the logits of the tokens at ``places`` [T], all held at once: [T, V] in at least fp32."""
    if head is None:
        logits = _own_logits(model, batch, segments, places)
        return logits.to(_at_least_fp32(logits.dtype))
    hidden, device = forward_hidden(model, batch, segments)[places], places.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        weight, bias = _cast(head.linear.weight, head.linear.bias, dtype)
        return _chunk_logits(hidden.to(dtype), weight, bias, head.scale, head.softcap)


def token_scores(
    hidden: Tensor,
    head: HeadSpec,
    labels: Tensor,
    places: Tensor,
    *,
    with_mean: bool = False,
    is_uniform: bool = False,
    chunk: int = CHUNK,
) -> Scores:
    """Score labels.

    Args:
        hidden: [N, H]. The product with the weights runs in its dtype (under autocast, in that one's), as in the
            model's own head; everything after it in fp32, or in fp64 where that is the dtype.
        head: the output layer.
        labels: [N] int64.
        places: [T] int64, the tokens that have a label: no other ever reaches the head.
        with_mean: whether ``mean_logps`` is wanted.
        is_uniform: whether the loss is the sum of ``logps`` times one number: then the backward pass makes no logits.
            The other scores carry no gradient then.
        chunk: tokens whose logits are held at a time.
    """
    linear = head.linear
    early = is_uniform and torch.is_grad_enabled()
    arguments = (hidden[places], linear.weight, linear.bias, labels[places], head.scale, head.softcap)
    logps_T, lse_T, mean_T = _TokenScores.apply(*arguments, with_mean, early, chunk)  # type: ignore[no-untyped-call]
    scores = Scores(logps_T, lse_T, mean_T if with_mean else None)
    return _scatter(scores, places, labels.shape[0])


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


def likely_head(model: Any) -> HeadSpec | None:
    """Return what `find_head` tries first, unproven: for a model without weights, whose memory is all that is asked."""
    return next(_candidates(model), None)


@torch.no_grad()
def check_head(model: Any, head: HeadSpec) -> bool:
    """Return whether the head gives the log-probabilities of the model's own logits, on random hidden states."""
    weight = head.linear.weight
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(16, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    # Logits of about 20: far into the bend of a cap (30 is usual), whatever the scale of the weights.
    probe = probe * (20 / F.linear(probe, weight).float().std().clamp(min=1e-6)).to(probe.dtype)
    labels = torch.randint(weight.shape[0], (16,), generator=generator).to(weight.device)
    wanted = _scores_of(_logits_of(model, probe), labels, with_mean=False).logps
    found = token_scores(probe, head, labels, torch.arange(16, device=weight.device)).logps
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


def _scores_of(logits_TV: Tensor, labels_T: Tensor, with_mean: bool) -> Scores:
    logits = logits_TV.to(_at_least_fp32(logits_TV.dtype))
    lse = logits.logsumexp(-1)
    return Scores(logits.gather(1, labels_T[:, None])[:, 0] - lse, lse, logits.mean(-1) - lse if with_mean else None)


def _scatter(scores: Scores, places: Tensor, size: int) -> Scores:
    logps, lse, mean = (None if x is None else x.new_zeros(size).index_put((places,), x) for x in scores)
    assert logps is not None
    assert lse is not None  # only the mean may be missing
    return Scores(logps, lse, mean)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _TokenScores(torch.autograd.Function):
    """Scores of T tokens that all have a label; gradients are made in the backward pass, or early."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        scale: float,
        softcap: float | None,
        with_mean: bool,
        early: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        device = hidden_TH.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TH.dtype
        ctx.scale, ctx.softcap, ctx.chunk, ctx.early = scale, softcap, chunk, early
        ctx.parameter_dtype = weight_VH.dtype
        lse_T = hidden_TH.new_empty(hidden_TH.shape[0], dtype=_at_least_fp32(ctx.dtype))
        logps_T = torch.empty_like(lse_T)
        mean_T = torch.empty_like(lse_T) if with_mean else None
        gradients = _Gradients.empty(ctx, hidden_TH, weight_VH, bias_V) if early else None
        with torch.autocast(device, enabled=False):
            weight, bias = _cast(weight_VH, bias_V, ctx.dtype)
            for part in _parts(hidden_TH.shape[0], chunk):
                hidden_CH, labels_C = hidden_TH[part].to(ctx.dtype), labels_T[part]
                logits_CV = _chunk_logits(hidden_CH, weight, bias, scale, softcap)
                lse_T[part] = logits_CV.logsumexp(-1)
                logps_T[part] = logits_CV.gather(1, labels_C[:, None])[:, 0] - lse_T[part]
                if mean_T is not None:
                    mean_T[part] = logits_CV.mean(-1) - lse_T[part]
                if gradients is not None:
                    one = torch.ones_like(lse_T[part])
                    upstream = _Upstream(one, torch.zeros_like(one), None)
                    grad_CV = _logits_grad(logits_CV, lse_T[part], labels_C, upstream, scale, softcap)
                    gradients.add(part, grad_CV, hidden_CH, weight)
                    del grad_CV
                del logits_CV  # before those of the next chunk are made
        ctx.save_for_backward(*(gradients or (hidden_TH, weight_VH, bias_V, labels_T, lse_T)))
        ctx.set_materialize_grads(False)
        return logps_T, lse_T, mean_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logps_grad_T: Tensor | None, lse_grad_T: Tensor | None, mean_grad_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if ctx.early:
            assert lse_grad_T is None  # nothing but the log-probabilities may be used
            assert mean_grad_T is None
            gradients = _Gradients(*ctx.saved_tensors).times(logps_grad_T)
        else:
            gradients = _late_gradients(ctx, logps_grad_T, lse_grad_T, mean_grad_T)
        hidden_TH, weight_VH, bias_V = gradients
        of_parameters = (None if x is None else x.to(ctx.parameter_dtype) for x in (weight_VH, bias_V))
        return (hidden_TH, *of_parameters, None, None, None, None, None, None)


class _Gradients(NamedTuple):
    """Of hidden states [T, H], weight [V, H] and bias [V]; ``None`` where none is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def empty(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> "_Gradients":
        """Zeros; those of weights are summed over chunks in fp32, for bf16 would lose the small ones."""
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dtype = _at_least_fp32(ctx.dtype)
        return _Gradients(
            torch.zeros_like(hidden_TH) if wants_hidden else None,
            torch.zeros_like(weight_VH, dtype=dtype) if wants_weight else None,
            torch.zeros_like(bias_V, dtype=dtype) if wants_bias and bias_V is not None else None,
        )

    def add(self, part: slice, grad_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
        """Add what the logits of a chunk give."""
        if self.bias is not None:
            self.bias.add_(grad_CV.sum(0))
        grad_CV = grad_CV.to(weight_VH.dtype)
        if self.hidden is not None:
            self.hidden[part] = (grad_CV @ weight_VH).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight.add_(grad_CV.T @ hidden_CH)

    def times(self, factor_T: Tensor | None) -> "_Gradients":
        """The gradients of a loss in which every log-probability has this factor: the first of T equal ones."""
        if factor_T is None or not len(factor_T):
            return _Gradients(*(None if x is None else x.zero_() for x in self))
        all_first = factor_T[:1].expand_as(factor_T)
        # Not on a GPU, for which it would have to wait.
        assert factor_T.is_cuda or torch.allclose(factor_T, all_first, rtol=0, atol=0, equal_nan=True)
        return _Gradients(*(None if x is None else x.mul_(factor_T[0]) for x in self))


def _late_gradients(
    ctx: Any, logps_grad_T: Tensor | None, lse_grad_T: Tensor | None, mean_grad_T: Tensor | None
) -> _Gradients:
    hidden_TH, weight_VH, bias_V, labels_T, lse_T = ctx.saved_tensors
    logps_grad_T, lse_grad_T = (torch.zeros_like(lse_T) if x is None else x for x in (logps_grad_T, lse_grad_T))
    gradients = _Gradients.empty(ctx, hidden_TH, weight_VH, bias_V)
    with torch.autocast(hidden_TH.device.type, enabled=False):
        weight, bias = _cast(weight_VH, bias_V, ctx.dtype)
        for part in _parts(hidden_TH.shape[0], ctx.chunk):
            hidden_CH = hidden_TH[part].to(ctx.dtype)
            logits_CV = _chunk_logits(hidden_CH, weight, bias, ctx.scale, ctx.softcap)
            mean_grad_C = None if mean_grad_T is None else mean_grad_T[part]
            upstream = _Upstream(logps_grad_T[part], lse_grad_T[part], mean_grad_C)
            grad_CV = _logits_grad(logits_CV, lse_T[part], labels_T[part], upstream, ctx.scale, ctx.softcap)
            gradients.add(part, grad_CV, hidden_CH, weight)
            del grad_CV, logits_CV  # before those of the next chunk are made
    return gradients


class _Upstream(NamedTuple):
    """Gradients of the loss with respect to the scores of a chunk: [C] each."""

    logps: Tensor
    lse: Tensor
    mean: Tensor | None


def _chunk_logits(
    hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    logits = F.linear(hidden_CH, weight_VH, bias_V).to(_at_least_fp32(hidden_CH.dtype))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _logits_grad(
    logits_CV: Tensor, lse_C: Tensor, labels_C: Tensor, grad: _Upstream, scale: float, softcap: float | None
) -> Tensor:
    """Gradient with respect to ``hidden @ weight.T + bias``.

    d lse = softmax; d logp = (one at the label) - softmax; d mean = 1 / V - softmax; then factor and slope of the cap.
    """
    of_softmax = grad.lse - grad.logps if grad.mean is None else grad.lse - grad.logps - grad.mean
    slope = 1 - (logits_CV / softcap) ** 2 if softcap is not None else None
    result = logits_CV.sub_(lse_C[:, None]).exp_().mul_(of_softmax[:, None])
    result[torch.arange(len(labels_C), device=labels_C.device), labels_C] += grad.logps
    if grad.mean is not None:
        result += grad.mean[:, None] / result.shape[1]
    if scale != 1.0:
        result *= scale
    return result if slope is None else result * slope


def _parts(size: int, chunk: int) -> Iterator[slice]:
    return (slice(first, first + chunk) for first in range(0, size, chunk))


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)
