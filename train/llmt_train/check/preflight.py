"""Checks of a run that need no weights: `check` reports what they find, `fit` begins with them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from llmt_shared.errors import ConfigError, LlmtError
from llmt_train.attention import Call, Machine, choose
from llmt_train.check.dryrun import attention_calls
from llmt_train.checkpoints import State, check_resumable, read_state
from llmt_train.config import RunConfig
from llmt_train.data.rows import AnyDataset
from llmt_train.data.stream import Plan, rows_consumed
from llmt_train.model.adapt import choose_trained
from llmt_train.model.fused import split_fused
from llmt_train.model.isolation import WAY_OUT
from llmt_train.model.liger import check_liger
from llmt_train.model.match import check_tokenizers, model_token_ids, read_token_ids
from llmt_train.model.recompute import layers_of, recompute

Result = TypeVar("Result")


@dataclass
class Preflight:
    """What is known of a run before anything is spent on it; ``None`` where a problem is in the way."""

    dataset: AnyDataset | None = None
    plan: Plan | None = None
    skeleton: Any | None = None
    """The model as it would train, but without weights: on the meta device."""
    compared: int | None = None
    """Tokens that the dataset's tokenizer and the model's have in common; ``None`` where the model brings none."""
    calls: list[Call] | None = None
    """What the layers ask of attention; ``None`` where only running the model tells."""
    problems: list[LlmtError] = field(default_factory=list)

    def attempt(self, check: Callable[[], Result]) -> Result | None:
        """Return what a check gives; keep what it raises as a problem."""
        try:
            return check()
        except LlmtError as problem:
            self.problems.append(problem)
            return None


def raise_problems(problems: Sequence[LlmtError]) -> None:
    """Raise all problems as one, if there are any; as a `ConfigError` where they are of several kinds."""
    if problems:
        kinds = {type(problem) for problem in problems}
        kind = kinds.pop() if len(kinds) == 1 else ConfigError
        raise kind("\n".join(dict.fromkeys(str(problem) for problem in problems)))


def compare_tokens(model: str, dataset: AnyDataset) -> int | None:
    """Return how many tokens the dataset's tokenizer and the model's have in common; ``None`` where one has none.

    Raises:
        ConfigError: a token has another id there.
    """
    ids = model_token_ids(model)
    if ids is None or dataset.tokenizer_dir is None:
        return None
    own = read_token_ids(dataset.tokenizer_dir / "tokenizer.json")
    check_tokenizers(own, ids, model)
    return len(own.keys() & ids.keys())


def check_attention(skeleton: Any, config: RunConfig, machine: Machine) -> list[Call] | None:
    """Refuse a model that does not reach packed attention, and a backend that cannot serve what it asks for.

    Returns:
        What it asks for; ``None`` where only running the model tells.

    Raises:
        ConfigError: naming the model, or the backend with its reason.
    """
    calls = attention_calls(skeleton, torch.bfloat16 if mixes_precisions(config, machine) else None)
    if calls is not None and not calls:
        raise ConfigError(
            f"{skeleton.config.model_type}: its layers never call packed attention, so documents of a row would see "
            f"each other; {WAY_OUT}"
        )
    deterministic = config.train.deterministic
    # Not yet, but by the time that the run attends: its trainer sees to it.
    machine = machine._replace(deterministic_torch=machine.deterministic_torch or deterministic)
    for call in sorted(set(calls or ()), key=str):
        choose(config.attention, call._replace(deterministic=deterministic), machine)
    return calls


def mixes_precisions(config: RunConfig, machine: Machine) -> bool:
    """Return whether a model with weights in fp32 computes in bf16."""
    has_bf16 = machine.device_type == "cuda" and machine.capability >= (8, 0)
    return config.precision == "bf16" or (config.precision == "auto" and has_bf16)


class Begun(NamedTuple):
    """What decides over the states that a run goes through."""

    plan: Plan
    digest: str
    """The dataset's."""
    base: str | None
    """See `State`."""

    def state(self, step: int, eval_loss: float | None = None) -> State:
        """Return where the run stands after a step, with its held-out loss where that is known."""
        return State(
            step=step,
            rows_consumed=rows_consumed(self.plan, step),
            rows_per_step=self.plan.rows_per_step,
            digest=self.digest,
            seed=self.plan.seed,
            base=self.base,
            eval_loss=eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None,
        )


def check_resumption(folder: Path, begun: Begun, config: RunConfig, model_config: Mapping[str, Any]) -> int:
    """Refuse to go on from a checkpoint of another run; return the steps that are done.

    Args:
        folder: the checkpoint.
        begun: the run that would go on.
        config: its config.
        model_config: its model's config, as plain data.

    Raises:
        ConfigError: naming each setting with its old and new value.
    """
    step = read_state(folder).step
    if step > begun.plan.total_steps:
        total = begun.plan.total_steps
        raise ConfigError(f"{folder}: {step} steps are done, more than the run's {total}; train longer")
    check_resumable(folder, begun.state(step), config.model_dump(mode="json"), model_config)
    return step


def adapt_skeleton(found: Preflight, config: RunConfig, machine: Machine) -> None:
    """Change the skeleton as the run changes its model: adapters, frozen parameters, checkpointing."""
    skeleton, train = found.skeleton, config.train
    assert skeleton is not None  # the caller looked
    if config.lora is None:
        split_fused(skeleton)
    if train.liger:
        found.attempt(partial(check_liger, machine.device_type))
    found.attempt(
        partial(choose_trained, skeleton, train.model_copy(update={"liger": False}), config.lora, machine.device_type)
    )
    if train.compile:
        found.attempt(partial(layers_of, skeleton, "train.compile"))
    found.attempt(partial(recompute, skeleton, train.checkpointing))
