"""From hidden states to the log-probability of every label, without ever holding all logits.

The logits of a chunk of tokens exist for a moment; the backward pass makes them again, for it takes any gradient per
token, so that all objectives share it. A loss that weighs all labels alike needs no second time: its gradients are
made, up to that weight, while the logits are there (the idea of Liger Kernel's fused cross-entropy, Hsu et al. 2024,
arXiv:2410.10989).

Under tensor parallel every rank has equally many rows of the output layer: it makes its part of a chunk's logits, and
the ranks exchange what a softmax needs of them, a few numbers per token (Shoeybi et al. 2019, arXiv:1909.08053).

Shape legend: N packed tokens, T tokens that have a label, C tokens of a chunk, H hidden size, V vocabulary, R rows of
it on this rank (R = V but for tensor parallel).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from llmt_train.parallel.collectives import enter, gather_same
from llmt_train.parallel.mesh import ALONE, Axis

CHUNK = 1024
"""Tokens whose logits are held at a time."""


@dataclass(frozen=True, eq=False)
class HeadSpec:
    """How a model makes logits of hidden states: ``cap(scale * (hidden @ weight.T + bias))``."""

    linear: nn.Linear
    """The output layer itself: whoever wraps or shards its parameters, they are read where they are used."""
    scale: float = 1.0
    """Cohere's ``logit_scale``, one over Granite's ``logits_scaling``."""
    softcap: float | None = None
    """c of ``c * tanh(logits / c)`` (Gemma's ``final_logit_softcapping``); ``None`` is no cap."""
    axis: Axis = ALONE
    """Ranks each of which has R consecutive rows of the weights, in the order of the ranks (tensor parallel)."""
    tokens: Axis = ALONE
    """Ranks each of which has a part of the hidden states' tokens (sequence parallel); if both are, they are the
    same ranks."""

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return this rank's rows of weight [R, H] and bias [R], as plain tensors."""
        weight, bias = self.linear.weight, self.linear.bias
        return _local(weight, self.axis), None if bias is None else _local(bias, self.axis)

    def whole(self, hidden: Tensor) -> Tensor:
        """Return all tokens of hidden states, for this rank to make its part of the logits of; gradients are summed."""
        is_shared, sp = self.axis.size > 1, self.tokens.size > 1
        return enter(hidden, self.axis if is_shared else self.tokens, sp, is_shared=is_shared)


class Scores(NamedTuple):
    """What a model thinks of every label: [N] each, 0 where there is no label; in at least fp32."""

    logps: Tensor
    """Log-probability of the label."""
    lse: Tensor
    """Logarithm of the sum of the exponentials of all logits."""
    mean_logps: Tensor | None
    """Mean log-probability over the vocabulary; ``None`` where it was not asked for."""


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
    """Score labels; ranks of ``head.axis`` do it together and get the same.

    Args:
        hidden: [N, H], or of each rank of ``head.tokens`` its part of them. The product with the weights runs in its
            dtype (under autocast, in that one's), as in the model's own head; everything after it in fp32, or in fp64
            where that is the dtype.
        head: the output layer.
        labels: [N] int64.
        places: [T] int64, the tokens that have a label: no other ever reaches the head.
        with_mean: whether ``mean_logps`` is wanted.
        is_uniform: whether the loss is the sum of ``logps`` times one number: then the backward pass makes no logits.
            The other scores carry no gradient then.
        chunk: tokens whose logits are held at a time.
    """
    plan = _Plan(head.scale, head.softcap, head.axis, with_mean, is_uniform and torch.is_grad_enabled(), chunk)
    arguments = (head.whole(hidden)[places], *head.parameters(), labels[places], plan)
    logps_T, lse_T, mean_T = _TokenScores.apply(*arguments)  # type: ignore[no-untyped-call]
    return scatter(Scores(logps_T, lse_T, mean_T if with_mean else None), places, labels.shape[0])


def logits_of(hidden: Tensor, head: HeadSpec) -> Tensor:
    """Return logits of all tokens given, held at once: [T, H] to [T, V] in at least fp32. Carries no gradient.

    Args:
        hidden: all T tokens, alike on all ranks of ``head.axis``.
        head: the output layer.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.no_grad(), torch.autocast(device, enabled=False):
        weight, bias = _cast(*head.parameters(), dtype)
        return gather_same(_chunk_logits(hidden.to(dtype), weight, bias, head), head.axis, 1)


def scatter(scores: Scores, places: Tensor, size: int) -> Scores:
    """Put the scores of T tokens to their places among ``size``; 0 is everywhere else."""
    logps, lse, mean = (None if x is None else x.new_zeros(size).index_put((places,), x) for x in scores)
    assert logps is not None
    assert lse is not None  # only the mean may be missing
    return Scores(logps, lse, mean)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a softmax is computed."""
    return torch.promote_types(dtype, torch.float32)


def _local(parameter: Tensor, axis: Axis) -> Tensor:
    """This rank's part of a parameter; inside the model's forward, where the axis is all that it is cut over."""
    if not isinstance(parameter, DTensor):
        return parameter
    local: Tensor = parameter.to_local(grad_placements=parameter.placements)
    assert local.shape[0] * axis.size == parameter.shape[0], f"{parameter.placements} outside of the model's forward"
    return local


class _Plan(NamedTuple):
    """How scores are made, beside the tensors."""

    scale: float
    softcap: float | None
    axis: Axis
    with_mean: bool
    early: bool
    """Whether gradients are made together with the scores."""
    chunk: int


class _TokenScores(torch.autograd.Function):
    """Scores of T tokens that all have a label; gradients are made in the backward pass, or early.

    Those of the hidden states are this rank's part of a sum over ``plan.axis``.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_RH: Tensor, bias_R: Tensor | None, labels_T: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        device = hidden_TH.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TH.dtype
        ctx.plan, ctx.parameter_dtype = plan, weight_RH.dtype
        lse_T = hidden_TH.new_empty(hidden_TH.shape[0], dtype=at_least_fp32(ctx.dtype))
        logps_T = torch.empty_like(lse_T)
        mean_T = torch.empty_like(lse_T) if plan.with_mean else None
        gradients = _Gradients.empty(ctx, hidden_TH, weight_RH, bias_R) if plan.early else None
        with torch.autocast(device, enabled=False):
            weight, bias = _cast(weight_RH, bias_R, ctx.dtype)
            for part in _parts(hidden_TH.shape[0], plan.chunk):
                hidden_CH, labels_C = hidden_TH[part].to(ctx.dtype), labels_T[part]
                logits_CR = _chunk_logits(hidden_CH, weight, bias, plan)
                logps_T[part], lse_T[part], mean_C = _chunk_scores(logits_CR, labels_C, plan)
                if mean_T is not None and mean_C is not None:
                    mean_T[part] = mean_C
                if gradients is not None:
                    one = torch.ones_like(lse_T[part])
                    upstream = _Upstream(one, torch.zeros_like(one), None)
                    grad_CR = _logits_grad(logits_CR, lse_T[part], labels_C, upstream, plan)
                    gradients.add(part, grad_CR, hidden_CH, weight)
                    del grad_CR
                del logits_CR  # before those of the next chunk are made
        ctx.save_for_backward(*(gradients or (hidden_TH, weight_RH, bias_R, labels_T, lse_T)))
        ctx.set_materialize_grads(False)
        return logps_T, lse_T, mean_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logps_grad_T: Tensor | None, lse_grad_T: Tensor | None, mean_grad_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if ctx.plan.early:
            assert lse_grad_T is None  # nothing but the log-probabilities may be used
            assert mean_grad_T is None
            gradients = _Gradients(*ctx.saved_tensors).times(logps_grad_T)
        else:
            gradients = _late_gradients(ctx, logps_grad_T, lse_grad_T, mean_grad_T)
        hidden_TH, weight_RH, bias_R = gradients
        of_parameters = (None if x is None else x.to(ctx.parameter_dtype) for x in (weight_RH, bias_R))
        return (hidden_TH, *of_parameters, None, None)


class _Gradients(NamedTuple):
    """Of hidden states [T, H], weight [R, H] and bias [R]; ``None`` where none is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def empty(ctx: Any, hidden_TH: Tensor, weight_RH: Tensor, bias_R: Tensor | None) -> "_Gradients":
        """Zeros; those of weights are summed over chunks in fp32, for bf16 would lose the small ones."""
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dtype = at_least_fp32(ctx.dtype)
        return _Gradients(
            torch.zeros_like(hidden_TH) if wants_hidden else None,
            torch.zeros_like(weight_RH, dtype=dtype) if wants_weight else None,
            torch.zeros_like(bias_R, dtype=dtype) if wants_bias and bias_R is not None else None,
        )

    def add(self, part: slice, grad_CR: Tensor, hidden_CH: Tensor, weight_RH: Tensor) -> None:
        """Add what the logits of a chunk give."""
        if self.bias is not None:
            self.bias.add_(grad_CR.sum(0))
        grad_CR = grad_CR.to(weight_RH.dtype)
        if self.hidden is not None:
            self.hidden[part] = (grad_CR @ weight_RH).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight.add_(grad_CR.T @ hidden_CH)

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
    hidden_TH, weight_RH, bias_R, labels_T, lse_T = ctx.saved_tensors
    logps_grad_T, lse_grad_T = (torch.zeros_like(lse_T) if x is None else x for x in (logps_grad_T, lse_grad_T))
    gradients = _Gradients.empty(ctx, hidden_TH, weight_RH, bias_R)
    with torch.autocast(hidden_TH.device.type, enabled=False):
        weight, bias = _cast(weight_RH, bias_R, ctx.dtype)
        for part in _parts(hidden_TH.shape[0], ctx.plan.chunk):
            hidden_CH = hidden_TH[part].to(ctx.dtype)
            logits_CR = _chunk_logits(hidden_CH, weight, bias, ctx.plan)
            mean_grad_C = None if mean_grad_T is None else mean_grad_T[part]
            upstream = _Upstream(logps_grad_T[part], lse_grad_T[part], mean_grad_C)
            grad_CR = _logits_grad(logits_CR, lse_T[part], labels_T[part], upstream, ctx.plan)
            gradients.add(part, grad_CR, hidden_CH, weight)
            del grad_CR, logits_CR  # before those of the next chunk are made
    return gradients


class _Upstream(NamedTuple):
    """Gradients of the loss with respect to the scores of a chunk: [C] each."""

    logps: Tensor
    lse: Tensor
    mean: Tensor | None


def _chunk_logits(hidden_CH: Tensor, weight_RH: Tensor, bias_R: Tensor | None, how: HeadSpec | _Plan) -> Tensor:
    logits = F.linear(hidden_CH, weight_RH, bias_R).to(at_least_fp32(hidden_CH.dtype))
    if how.scale != 1.0:
        logits = logits * how.scale
    return logits if how.softcap is None else how.softcap * torch.tanh(logits / how.softcap)


def _chunk_scores(logits_CR: Tensor, labels_C: Tensor, plan: _Plan) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability, log-sum-exp and mean log-probability: [C] each.

    Ranks take the largest of their log-sum-exps, so that no exponential overflows, and add up the rest.
    """
    places_C, is_own_C = _own_places(labels_C, logits_CR.shape[1], plan.axis)
    lse_C, label_C = logits_CR.logsumexp(-1), logits_CR.gather(1, places_C[:, None])[:, 0]
    mean_C = logits_CR.mean(-1) if plan.with_mean else None
    if plan.axis.size > 1:
        largest_C = lse_C.clone()
        dist.all_reduce(largest_C, dist.ReduceOp.MAX, plan.axis.group)
        parts = [(lse_C - largest_C).exp(), torch.where(is_own_C, label_C, 0)]
        sums = torch.stack(parts if mean_C is None else [*parts, mean_C / plan.axis.size])
        dist.all_reduce(sums, group=plan.axis.group)
        lse_C, label_C = largest_C + sums[0].log(), sums[1]
        mean_C = None if mean_C is None else sums[2]
    return label_C - lse_C, lse_C, None if mean_C is None else mean_C - lse_C


def _own_places(labels_C: Tensor, num_rows: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Which of this rank's rows a label is, any where it is another rank's; and whether it is this one's."""
    places_C = labels_C - axis.rank * num_rows
    return places_C.clamp(0, num_rows - 1), (places_C >= 0) & (places_C < num_rows)


def _logits_grad(logits_CR: Tensor, lse_C: Tensor, labels_C: Tensor, grad: _Upstream, plan: _Plan) -> Tensor:
    """Gradient with respect to ``hidden @ weight.T + bias``.

    d lse = softmax; d logp = (one at the label) - softmax; d mean = 1 / V - softmax; then factor and slope of the cap.
    """
    of_softmax = grad.lse - grad.logps if grad.mean is None else grad.lse - grad.logps - grad.mean
    slope = 1 - (logits_CR / plan.softcap) ** 2 if plan.softcap is not None else None
    places_C, is_own_C = _own_places(labels_C, logits_CR.shape[1], plan.axis)
    result = logits_CR.sub_(lse_C[:, None]).exp_().mul_(of_softmax[:, None])
    result[torch.arange(len(labels_C), device=labels_C.device), places_C] += torch.where(is_own_C, grad.logps, 0)
    if grad.mean is not None:
        result += grad.mean[:, None] / (result.shape[1] * plan.axis.size)
    if plan.scale != 1.0:
        result *= plan.scale
    return result if slope is None else result * slope


def _parts(size: int, chunk: int) -> Iterator[slice]:
    return (slice(first, first + chunk) for first in range(0, size, chunk))


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)
