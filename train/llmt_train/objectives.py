"""Losses as pure functions of per-token scores: ``(scores, batch) -> Measures``.

Every measure is a sum with the count it is to be divided by, never a mean: a micro-batch cannot know by what the whole
optimizer step divides, the step does. Sums over segments run in fp64, because the log-probability of an answer is
hundreds of times larger than the differences that preferences are made of.

Ranks that share a micro-batch's tokens (context parallel) have a part of each measure; all parts add up to it. Of
tokens each rank has its own. What is of pairs all ranks make, of sums over all tokens, and each has an equal share.

Shape legend: N packed tokens of this rank, P pieces, Q pairs of a micro-batch, K values of a measure.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmt_shared.segments import IGNORE
from llmt_train.data.batch import PackedBatch
from llmt_train.model.head import Scores
from llmt_train.parallel.collectives import total


class Measure(NamedTuple):
    """A mean that is not yet divided."""

    values: Tensor
    """[K]; their sum is divided."""
    counts: Tensor
    """[K]; by how much each adds to what is divided by: 1, or 0 where it does not count; a share of 1 where ranks
    share it."""
    piece: Tensor
    """[K] int64; the piece that each value is of, and by it the source."""
    per: str
    """Key of ``PackedBatch.denominators``: what is counted over the whole optimizer step."""


Measures = dict[str, tuple[Measure, ...]]
"""By name; each stands for the sum of its parts' means. ``loss`` is what a step minimises; the others carry no
gradient."""

Objective = Callable[[Scores, PackedBatch], Measures]


def clm(scores: Scores, batch: PackedBatch, *, z_loss: float = 0.0, label_smoothing: float = 0.0) -> Measures:
    """Next-token cross-entropy over all targets.

    Args:
        scores: of every label; with ``mean_logps`` where labels are smoothed.
        batch: the micro-batch.
        z_loss: factor of the squared logarithm of the softmax's normaliser, which keeps logits from drifting (PaLM,
            Chowdhery et al. 2022, arXiv:2204.02311); 0 is none.
        label_smoothing: share of each target that is spread evenly over the vocabulary (Szegedy et al. 2016,
            arXiv:1512.00567); 0 is none.
    """
    losses = -scores.logps
    if label_smoothing:
        assert scores.mean_logps is not None  # the module asks for it
        losses = (1 - label_smoothing) * losses - label_smoothing * scores.mean_logps
    if z_loss:
        losses = losses + z_loss * scores.lse**2
    counts, piece = (batch.labels[0] != IGNORE).to(losses.dtype), batch.segment_ids_flat.long()
    return {
        "loss": (Measure(losses, counts, piece, "targets"),),
        "nll": (Measure(-scores.logps.detach(), counts, piece, "targets"),),
    }


def dpo(
    scores: Scores,
    batch: PackedBatch,
    *,
    loss: Literal["sigmoid", "robust", "ipo"] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
    sft_weight: float = 0.0,
) -> Measures:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290), a mean over pairs.

    Args:
        scores: of the targets of both sides.
        batch: with pairs; without ``reference_logps`` the reference is uniform (reference-free).
        loss: ``sigmoid``; ``robust``, which corrects for a known share of flipped pairs (Chowdhury et al. 2024,
            arXiv:2403.00409); or ``ipo`` (Azar et al. 2023, arXiv:2310.12036).
        beta: how strongly the policy is held to the reference; 1 / (2 beta) is the margin that ``ipo`` aims at.
        label_smoothing: share of pairs that are expected to be the wrong way round. With ``sigmoid`` this is
            conservative DPO (Mitchell 2023); ``ipo`` has no use for it.
        length_normalised: divide each side's log-ratio by its number of targets, as TRL's ``ipo`` and
            ``sigmoid_norm`` do.
        sft_weight: factor of the mean negative log-likelihood of the chosen targets, added to the loss (Pang et al.
            2024, arXiv:2404.19733); 0 is none.
    """
    assert batch.pairs is not None  # preference data has them
    policy = pair_logps(scores, batch)
    ratios = policy if batch.reference_logps is None else policy - batch.reference_logps
    if length_normalised:
        ratios = ratios / _num_labels(batch)[batch.pairs]
    margins = ratios[:, 0] - ratios[:, 1]
    losses = _pair_loss(loss, beta * margins, label_smoothing) if loss != "ipo" else (margins - 1 / (2 * beta)) ** 2
    nll = _chosen_nll(scores, batch, "chosen_targets")
    sft = (nll._replace(values=sft_weight * nll.values),) if sft_weight else ()
    rewards = beta * ratios.detach()
    return {
        "loss": (_per_pair(losses, batch), *sft),
        "rewards_chosen": (_per_pair(rewards[:, 0], batch),),
        "rewards_rejected": (_per_pair(rewards[:, 1], batch),),
        "margin": (_per_pair(beta * margins.detach(), batch),),
        **_pair_metrics(policy.detach(), margins.detach(), nll, batch),
    }


def pair_logps(scores: Scores, batch: PackedBatch) -> Tensor:
    """Return the log-probability of both sides of every pair, chosen then rejected, given the prompt: [Q, 2] fp64.

    Ranks that share the tokens get the same.
    """
    assert batch.pairs is not None  # preference data has them
    return _sums(scores.logps, batch)[batch.pairs]


def _pair_loss(loss: str, logits: Tensor, label_smoothing: float) -> Tensor:
    smoothed = -(1 - label_smoothing) * F.logsigmoid(logits)
    if not label_smoothing:
        return smoothed
    if loss == "robust":
        return (smoothed + label_smoothing * F.logsigmoid(-logits)) / (1 - 2 * label_smoothing)
    return smoothed - label_smoothing * F.logsigmoid(-logits)


def orpo(
    scores: Scores, batch: PackedBatch, *, beta: float = 0.1, nll_on: Literal["response", "all"] = "response"
) -> Measures:
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691): needs no reference.

    Args:
        scores: of the targets of both sides; with ``nll_on: all`` of the chosen sides' prompts too.
        batch: with pairs; with ``in_response`` where prompts have labels.
        beta: factor of the odds-ratio term, a mean over pairs (lambda in the paper).
        nll_on: whether the negative log-likelihood is a mean over the chosen answers' targets (the paper's equation 2)
            or over the chosen prompts and answers (its authors' code).
    """
    assert batch.pairs is not None  # preference data has them
    answers = scores.logps if batch.in_response is None else scores.logps * batch.in_response
    sums = _sums(answers, batch)[batch.pairs]
    # Not above the logarithm of 1 - 1e-12: an answer that is certain has infinite odds.
    means = (sums / _num_labels(batch)[batch.pairs]).clamp(max=-1e-12)
    odds = means - _log1mexp(means)
    log_odds = odds[:, 0] - odds[:, 1]
    nll = _chosen_nll(scores, batch, "chosen_targets" if nll_on == "response" else "chosen_labels")
    return {
        "loss": (nll, _per_pair(-beta * F.logsigmoid(log_odds), batch)),
        "log_odds": (_per_pair(log_odds.detach(), batch),),
        **_pair_metrics(sums.detach(), log_odds.detach(), nll, batch),
    }


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler 2012)."""
    near_zero = x > -math.log(2)
    # The branch that is not taken must not have an infinite slope either: infinity times 0 is NaN.
    small, large = x.where(near_zero, torch.full_like(x, -1.0)), x.where(~near_zero, torch.full_like(x, -1.0))
    return torch.where(near_zero, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def _pair_metrics(sums: Tensor, margins: Tensor, nll: Measure, batch: PackedBatch) -> Measures:
    """Log-probabilities of both sides, the share of pairs the right way round, and the chosen sides' likelihood."""
    return {
        "accuracy": (_per_pair((margins > 0).to(margins.dtype), batch),),
        "logps_chosen": (_per_pair(sums[:, 0], batch),),
        "logps_rejected": (_per_pair(sums[:, 1], batch),),
        "nll": (nll._replace(values=nll.values.detach()),),
    }


def _per_pair(values_Q: Tensor, batch: PackedBatch) -> Measure:
    assert batch.pairs is not None  # the objectives looked
    num_ranks = batch.split.cp.size
    return Measure(values_Q / num_ranks, torch.ones_like(values_Q) / num_ranks, batch.pairs[:, 0], "pairs")


def _chosen_nll(scores: Scores, batch: PackedBatch, per: str) -> Measure:
    """Negative log-likelihood of the chosen sides' targets, or of all their labels."""
    assert batch.pairs is not None  # the objectives looked
    piece = batch.segment_ids_flat.long()
    is_chosen = torch.zeros(len(batch.lengths), dtype=torch.bool, device=piece.device)
    is_chosen[batch.pairs[:, 0]] = True
    counted = is_chosen[piece] & (_is_target(batch) if per == "chosen_targets" else batch.labels[0] != IGNORE)
    counts = counted.to(scores.logps.dtype)
    return Measure(-scores.logps * counts, counts, piece, per)


def _is_target(batch: PackedBatch) -> Tensor:
    return batch.labels[0] != IGNORE if batch.in_response is None else batch.in_response


def _num_labels(batch: PackedBatch) -> Tensor:
    """[P] targets of each piece."""
    return _sums(_is_target(batch), batch)


def _sums(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """[P] sums over the tokens of each piece, those of other ranks too, in fp64."""
    zeros = torch.zeros(len(batch.lengths), dtype=torch.float64, device=values_N.device)
    return total(zeros.index_add(0, batch.segment_ids_flat.long(), values_N.double()), batch.split.cp)


def share(measure: tuple[Measure, ...], denominators: dict[str, float]) -> Tensor:
    """Return a micro-batch's part of the step's mean: the parts of all micro-batches add up to it."""
    parts = [part.values.sum() / denominators[part.per] for part in measure]
    return sum(parts[1:], parts[0])
