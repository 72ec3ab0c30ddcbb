"""The learning rate as a pure function of the step."""

import math
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from llmt_shared.config import parse_count
from llmt_shared.errors import ConfigError
from llmt_train.config import RateConfig

_WSD_DECAY = "20%"  # share of the run; MiniCPM (Hu et al. 2024, arXiv:2404.06395) finds 10 % enough, longer is safer


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: RateConfig, total: int, tokens_per_step: int = 0
) -> LambdaLR:
    """Return the scheduler of a run of ``total`` optimizer steps of ``tokens_per_step`` tokens, padding included."""
    factor = partial(
        lr_factor,
        total=total,
        schedule=config.schedule,
        warmup=resolve(config.warmup, total, tokens_per_step),
        decay=_decay_steps(config, total, tokens_per_step),
        floor=config.min_lr / config.lr,
    )
    return LambdaLR(optimizer, factor)


def falling_steps(config: RateConfig, total: int, tokens_per_step: int) -> int:
    """Return over how many of a run's last steps the learning rate falls."""
    after_warmup = total - resolve(config.warmup, total, tokens_per_step)
    if config.schedule == "wsd":
        return min(after_warmup, _decay_steps(config, total, tokens_per_step))
    return 0 if config.schedule == "constant" else after_warmup


def _decay_steps(config: RateConfig, total: int, tokens_per_step: int) -> int:
    """Of wsd; 0 never falls."""
    return resolve(_WSD_DECAY if config.decay is None else config.decay, total, tokens_per_step)


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


def resolve(duration: int | str, total: int, tokens_per_step: int) -> int:
    """Return a number of steps from a number, a share such as ``3%`` of all steps, or tokens such as ``100M tokens``.

    A share is rounded to the nearest step, tokens to the step in which they are reached.
    """
    if isinstance(duration, int):
        return duration
    if duration.endswith("%"):
        return round(float(duration.rstrip("% ")) / 100 * total)
    return -(-parse_count(duration.removesuffix("tokens")) // tokens_per_step)


def check_schedule(config: RateConfig, total: int, tokens_per_step: int) -> None:
    """Refuse a warm-up or decay that the run has no room for: its rate would never be what the config says.

    Raises:
        ConfigError: naming both lengths in steps.
    """
    warmup = resolve(config.warmup, total, tokens_per_step)
    if warmup > total:
        raise ConfigError(
            f"optim.warmup: {config.warmup} is {warmup} steps, but the run has {total}: the learning rate would never "
            "reach optim.lr; wanted a shorter warm-up, such as 3%, or a longer run"
        )
    decay = resolve(config.decay, total, tokens_per_step) if config.decay is not None else 0
    if warmup + decay > total:
        raise ConfigError(
            f"optim.warmup and optim.decay: {warmup} and {decay} steps do not fit into the run's {total}; wanted "
            "shorter ones, such as 3% and 20%, or a longer run"
        )
