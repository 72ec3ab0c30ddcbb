"""Whether rows and model can be shared out over the processes of a run, and how many of these there are."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from transformers.modeling_layers import GradientCheckpointingLayer

from llmt_shared.errors import ConfigError
from llmt_train.config import ParallelConfig, RunConfig
from llmt_train.parallel.layout import Layout
from llmt_train.parallel.plans import check_plan, vocabulary_note
from llmt_train.parallel.started import how_started


def num_processes(config: ParallelConfig, *, on: str | None = None, devices: int | None = None) -> int:
    """Return how many processes a run has, by what is known of it: one for each device.

    Args:
        config: the run's.
        on: the GPU that is to train it, where that is not here.
        devices: how many there are to be, where somebody says so.
    """
    if devices is not None:
        return devices
    if on is None and (launched := launched_processes()) is not None:
        return launched
    inner = config.cp * config.tp
    if config.dp != "auto":
        return config.dp * inner
    if on is None:
        return torch.cuda.device_count() or inner
    return inner * config.replicate


def launched_processes(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return how many processes this one is one of, as its launcher says; ``None`` where a user started it.

    Raises:
        ConfigError: the launcher says half of it.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        return dist.get_world_size()
    started = how_started(environment)
    return started.world if started is not None else None


def processes_of_machine(world: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return how many of the processes are on this machine; all, where nobody says otherwise."""
    started = how_started(environment)
    return world if started is None or started.local_world is None else started.local_world


def check_rows(config: ParallelConfig, length: int) -> None:
    """Refuse rows whose tokens cannot be shared out evenly.

    Args:
        config: the run's.
        length: tokens of a row.

    Raises:
        ConfigError: naming the length and the numbers of ranks that would do.
    """
    shares_tokens = config.sp and config.tp > 1
    ranks = config.cp * (config.tp if shares_tokens else 1)
    if length % ranks == 0:
        return
    said = f"cp {config.cp} x tp {config.tp} (sp)" if shares_tokens else f"cp {config.cp}"
    raise ConfigError(
        f"parallel: {said} = {ranks} ranks share the tokens of a row, but its length {length} does not divide by "
        f"{ranks}; legal for such rows: {_divisors(length, at_most=8 * ranks)}"
        + ("; or `sp: false`" if shares_tokens and length % config.cp == 0 else "")
        + f"; or pack rows of {length - length % ranks or ranks} tokens"
    )


def layout_checks(skeleton: Any, config: RunConfig, calls: list[Any] | None) -> Iterator[Callable[[], None]]:
    """Yield what is to be asked of a model under a run's layout, each of which may raise a `ConfigError`.

    Args:
        skeleton: the model.
        config: the run.
        calls: what it asks of its attention, as far as that is known.
    """
    if config.parallel.tp > 1:
        yield partial(_check_tp, skeleton, config)
    if config.parallel.cp > 1:
        yield partial(_check_cp, skeleton, config.parallel, calls)


def _check_tp(skeleton: Any, config: RunConfig) -> None:
    tp = config.parallel.tp
    if config.lora is not None:
        raise ConfigError(
            f"parallel.tp: {tp}, but adapters (lora) cannot be shared out by tp; set `parallel: {{tp: 1}}`: the model "
            "beside them is sharded over all devices all the same (FSDP)"
        )
    check_plan(skeleton.config, tp)


def _check_cp(skeleton: Any, config: ParallelConfig, calls: list[Any] | None) -> None:
    """Between attentions a rank has some tokens with all heads, inside them all tokens with some heads."""
    model, cp = skeleton.config.get_text_config(), config.cp
    heads, layers = (getattr(model, name, None) for name in ("num_attention_heads", "num_hidden_layers"))
    if heads is None or (calls is not None and layers is not None and len(calls) < layers):
        raise ConfigError(
            f"parallel.cp: {cp}, but not every layer of {model.model_type} is one whose attention could share out its "
            "heads; set `parallel: {cp: 1}`"
        )
    is_shared = config.tp > 1 and heads % config.tp == 0  # else that is a problem of its own
    own = heads // config.tp if is_shared else heads
    if own % cp:
        each = f" (of {heads}, by tp {config.tp})" if is_shared else ""
        raise ConfigError(
            f"parallel.cp: {cp} does not divide {model.model_type}'s {own} attention heads{each}; legal: "
            f"{_divisors(own)}"
        )


def notes(skeleton: Any, layout: Layout, rows_per_step: int) -> Iterator[str]:
    """Yield what a person should know of a layout that is no mistake.

    Args:
        skeleton: the model.
        layout: of the run's processes.
        rows_per_step: of an optimizer step.
    """
    head = skeleton.get_output_embeddings()
    if head is not None and (note := vocabulary_note(head.weight.shape[0], layout.tp)) is not None:
        yield note.removeprefix("note: ")
    if layout.averaged > 1 and not any(isinstance(module, GradientCheckpointingLayer) for module in skeleton.modules()):
        yield (
            f"transformers does not tell the layers of {type(skeleton).__name__}, so every device gathers all of its "
            "parameters at once, which takes more memory"
        )
    if rows_per_step < layout.dp:
        yield (
            f"a step has {rows_per_step} row{'s' if rows_per_step > 1 else ''} for dp {layout.dp}, so "
            f"{layout.dp - rows_per_step} of these have none; a larger batch.tokens, or cp, would use them"
        )


def named(layout: Layout, *, sp: bool) -> str:
    """Return a layout as a person reads it.

    >>> named(Layout(2, 2, 1, 2), sp=True)
    '8: dp 4 (2 copies) x tp 2 (sp)'
    """
    copies = f" ({layout.replicate} copies)" if layout.replicate > 1 else ""
    axes = [f"dp {layout.dp}{copies}"] if layout.dp > 1 else []
    axes += [f"cp {layout.cp}"] if layout.cp > 1 else []
    axes += [f"tp {layout.tp}{' (sp)' if sp else ''}"] if layout.tp > 1 else []
    return f"{layout.world}: {' x '.join(axes) or 'dp 1'}"


def _divisors(number: int, at_most: int | None = None) -> str:
    most = number if at_most is None else min(number, at_most)
    return ", ".join(str(divisor) for divisor in range(1, most + 1) if number % divisor == 0)
