"""AdamW with weight decay where it belongs, and the learning rate as a pure function of the step."""

import math
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from llmt_train.config import OptimConfig, resolve_steps

_WSD_DECAY = "20%"  # share of the run; MiniCPM (Hu et al. 2024, arXiv:2404.06395) finds 10 % enough, longer is safer


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the parameters that train; one fused kernel where they lie on a GPU."""
    groups = parameter_groups(model, config.weight_decay)
    on_gpu = all(parameter.is_cuda for parameter in model.parameters())
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=on_gpu or None)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trained parameters into those that decay and those that do not.

    Not decayed: parameters with fewer than two dims (biases, norms) and the weights of embedding modules, whose rows
    for rare tokens would shrink with nothing to pull them back. A head tied to an embedding is the same tensor.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, total: int) -> LambdaLR:
    """Return the scheduler of a run of ``total`` optimizer steps."""
    factor = partial(
        lr_factor,
        total=total,
        schedule=config.schedule,
        warmup=resolve_steps(config.warmup, total),
        decay=resolve_steps(config.decay or _WSD_DECAY, total),
        floor=config.min_lr / config.lr,
    )
    return LambdaLR(optimizer, factor)


def lr_factor(step: int, *, total: int, schedule: str, warmup: int, decay: int, floor: float) -> float:
    """Return the learning rate of a step as a share of the largest one.

    Args:
        step: optimizer steps done before this one: 0, 1, .. total - 1.
        total: steps of the run.
        schedule: ``constant``, ``linear``, ``cosine`` (Loshchilov and Hutter 2017, arXiv:1608.03983) or ``wsd``
            (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395, with the linear decay of Haegele et al. 2024,
            arXiv:2405.18392).
        warmup: steps of a linear rise that reaches 1 at step ``warmup - 1``, so that no step has a rate of 0.
        decay: wsd: the last steps of the run, over which the rate falls; at most those after the warm-up.
        floor: share that the rate would reach at step ``total``.
    """
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, total - decay) if schedule == "wsd" else warmup
    progress = min(1.0, max(0, step - start) / max(1, total - start))
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    return floor + (1 - floor) * (1 - progress)
