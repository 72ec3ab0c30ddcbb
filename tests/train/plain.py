"""What plain transformers and the published formulas make of rows: one segment per padded row, all logits, autograd.

Nothing here knows our batches, attention, head or objectives.

Shape legend: S segments, T tokens of the longest, n tokens of one, V vocabulary.
"""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from train.rows import Row, Segment
from train.tiny_models import tiny
from transformers import AutoModelForCausalLM

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest relative error of losses, and of gradients as `gradient_error` measures it."""


@cache
def model_of(family: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A packed model that nobody changes; its weights are large enough for sharp distributions."""
    return tiny(family, dtype=dtype, seed=seed, initializer_range=0.2)


@cache
def plain_of(family: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """`plain_copy` of the same."""
    return plain_copy(model_of(family, dtype, seed))


class Answer(NamedTuple):
    """What a model says of a segment's tokens but the first."""

    logits: Tensor
    """[n - 1, V]."""
    labels: Tensor
    """[n - 1]."""
    is_target: Tensor
    """[n - 1] bool."""

    @property
    def logps(self) -> Tensor:
        return self.logits.log_softmax(-1).gather(1, self.labels[:, None])[:, 0]


def plain_copy(model: Any) -> Any:
    """The same weights in a model of transformers' own attention: eager, but sdpa in fp64, for eager rounds to fp32."""
    attention = "sdpa" if model.dtype == torch.float64 else "eager"
    plain = AutoModelForCausalLM.from_config(
        copy.deepcopy(model.config), dtype=model.dtype, attn_implementation=attention
    )
    plain.load_state_dict(model.state_dict())
    return plain


def answers(plain: Any, segments: Sequence[Segment]) -> list[Answer]:
    """Run a model on a padded batch with a two-dimensional mask, one segment per row."""
    ids_ST = torch.zeros(len(segments), max(len(segment.ids) for segment in segments), dtype=torch.int64)
    mask_ST = torch.zeros_like(ids_ST)
    for row, segment in enumerate(segments):
        ids_ST[row, : len(segment.ids)] = torch.from_numpy(segment.ids)
        mask_ST[row, : len(segment.ids)] = 1
    logits = plain(input_ids=ids_ST, attention_mask=mask_ST, use_cache=False).logits
    result = []
    for row, segment in enumerate(segments):
        last, is_target = len(segment.ids) - 1, torch.from_numpy(segment.is_target)
        result.append(Answer(logits[row, :last], ids_ST[row, 1 : last + 1], is_target[1:]))
    return result


def clm_measures(rows: Sequence[Row], plain: Any, *, z_loss: float = 0.0, label_smoothing: float = 0.0) -> dict:
    """Cross-entropy by torch, with its own label smoothing; PaLM's z-loss: the mean of log(Z)^2."""
    said = answers(plain, [segment for row in rows for segment in row.segments])
    logits = torch.cat([answer.logits[answer.is_target] for answer in said])
    labels = torch.cat([answer.labels[answer.is_target] for answer in said])
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    loss = loss + z_loss * torch.log(torch.exp(logits).sum(-1)).square().mean()
    return {"loss": loss, "nll": F.cross_entropy(logits, labels)}


class Side(NamedTuple):
    """One side of a pair: scalars, in fp64."""

    logp: Tensor
    """Of its targets, under the policy."""
    reference: Tensor | float
    num_targets: int
    nll: Tensor
    """[targets]."""
    nll_of_all: Tensor
    """[n - 1]; of the prompt too."""


def sides(rows: Sequence[Row], plain: Any, reference: Any = None) -> list[tuple[Side, Side]]:
    """Chosen and rejected side of every pair of rows.

    Args:
        rows: with pairs.
        plain: the policy.
        reference: a model; ``"segment"``, the segments' own numbers; or ``None`` for a uniform one.
    """
    segments = [row.segments[side] for row in rows for pair in row.pairs for side in pair]
    if reference is None:
        values: list[Any] = [0.0] * len(segments)
    elif reference == "segment":
        values = [segment.reference for segment in segments]
    else:
        with torch.no_grad():
            values = [answer.logps[answer.is_target].double().sum() for answer in answers(reference, segments)]
    made = []
    for answer, value in zip(answers(plain, segments), values, strict=True):
        logps = answer.logps.double()
        of_targets = logps[answer.is_target]
        made.append(Side(of_targets.sum(), value, len(of_targets), -of_targets, -logps))
    return list(zip(made[::2], made[1::2], strict=True))


def dpo_measures(
    pairs: Sequence[tuple[Side, Side]],
    *,
    loss: str,
    beta: float,
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
    sft_weight: float = 0.0,
) -> dict:
    """Equation 7 of Rafailov et al. 2023, and what others made of it; see `dpo_loss`."""
    losses, rewards = [], []
    for pair in pairs:
        ratios = [(side.logp - side.reference) / (side.num_targets if length_normalised else 1) for side in pair]
        losses.append(dpo_loss(ratios[0] - ratios[1], loss, beta, label_smoothing))
        rewards.append([beta * ratio for ratio in ratios])
    nll = torch.cat([chosen.nll for chosen, _ in pairs]).mean()
    return {
        "loss": mean(losses) + sft_weight * nll,
        "rewards_chosen": mean([chosen for chosen, _ in rewards]),
        "rewards_rejected": mean([rejected for _, rejected in rewards]),
        "margin": mean([chosen - rejected for chosen, rejected in rewards]),
        "accuracy": mean([float(chosen > rejected) for chosen, rejected in rewards]),
        "nll": nll,
        **_logps(pairs),
    }


def dpo_loss(h: Tensor, loss: str, beta: float, eps: float) -> Tensor:
    """Loss of a pair, of the difference ``h`` of its log-ratios: DPO, cDPO (Mitchell 2023), robust DPO, IPO."""
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2  # equation 17 of Azar et al. 2023, with tau for beta
    right, wrong = -torch.log(torch.sigmoid(beta * h)), -torch.log(torch.sigmoid(-beta * h))
    if loss == "robust":
        return ((1 - eps) * right - eps * wrong) / (1 - 2 * eps)  # equation 12 of Chowdhury et al. 2024
    return (1 - eps) * right + eps * wrong


def orpo_measures(pairs: Sequence[tuple[Side, Side]], *, beta: float, nll_on: str) -> dict:
    """Equations 3 to 7 of Hong et al. 2024: P is the geometric mean of the probabilities of the answer's tokens."""
    log_odds = []
    for pair in pairs:
        chosen, rejected = (torch.exp(side.logp / side.num_targets) for side in pair)
        log_odds.append(torch.log((chosen / (1 - chosen)) / (rejected / (1 - rejected))))
    nll = torch.cat([chosen.nll if nll_on == "response" else chosen.nll_of_all for chosen, _ in pairs]).mean()
    return {
        "loss": nll + beta * mean([-torch.log(torch.sigmoid(each)) for each in log_odds]),
        "log_odds": mean(log_odds),
        "accuracy": mean([float(each > 0) for each in log_odds]),
        "nll": nll,
        **_logps(pairs),
    }


def _logps(pairs: Sequence[tuple[Side, Side]]) -> dict:
    return {
        "logps_chosen": mean([chosen.logp for chosen, _ in pairs]),
        "logps_rejected": mean([rejected.logp for _, rejected in pairs]),
    }


def mean(values: Sequence[Any]) -> Any:
    return sum(values) / len(values)


def numbers(measures: dict) -> dict[str, float]:
    """The same without their graphs."""
    return {name: torch.as_tensor(value, dtype=torch.float64).item() for name, value in measures.items()}


def gradients(loss: Tensor, plain: Any) -> dict[str, Tensor]:
    """Of every parameter."""
    names, parameters = zip(*plain.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
