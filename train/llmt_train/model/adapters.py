"""Low-rank adapters in the layers of a model, by `peft`: added, switched off, merged, told apart from the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmt_shared.errors import ConfigError
from llmt_train.config import LoraConfig
from llmt_train.model.freezing import matching

_MARK = ".lora_"
"""What the names of all parameters of adapters have in them."""


def add_adapters(model: Any, config: LoraConfig, *, seed: int) -> None:
    """Put an adapter beside every target layer; nothing but the adapters and ``train_also`` trains from then on.

    The second matrix of an adapter is 0, so that the model is as it was. Adapters are fp32, whatever the model is.

    Args:
        model: of transformers; changed in place, its class stays.
        config: of the adapters.
        seed: of the adapters' first matrices; torch's own generator is left as it was.

    Raises:
        ConfigError: `peft` is not there; a target or pattern finds nothing; a target is the embedding too.
    """
    try:
        from peft import LoraConfig as PeftConfig
    except ModuleNotFoundError:
        raise ConfigError("lora: needs the package peft; run: pip install 'llmt[peft]'") from None
    linear = _linear_layers(model)
    _check_targets(config.targets, linear)
    _check_shared(model, config.targets)
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_rslora=config.rank_stabilised,
        target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
        fan_in_fan_out="Conv1D" in linear.values(),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(peft_config)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
    for parameter in matching(model, config.train_also, "lora.train_also"):
        parameter.requires_grad_(True)


def is_adapter(parameter: str) -> bool:
    """Return whether a name is of an adapter's parameter."""
    return _MARK in parameter


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before `add_adapters`, for a while."""
    layers = _layers(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_adapters(model: Any) -> None:
    """Add every adapter's update to the weights beside it and remove the adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    model.__dict__.pop("peft_config", None)


def _layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _linear_layers(model: nn.Module) -> dict[str, str]:
    """Class of each linear layer by the last part of its name."""
    named = ((name.rpartition(".")[2], type(module).__name__) for name, module in model.named_modules())
    return {name: kind for name, kind in named if kind in ("Linear", "Conv1D")}


def _check_targets(targets: str | tuple[str, ...], linear: Mapping[str, str]) -> None:
    unknown = [target for target in targets if target not in linear] if targets != "all-linear" else []
    if unknown:
        raise ConfigError(
            f"lora.targets: the model has no linear layer {unknown[0]!r}; it has {', '.join(sorted(linear))}"
        )


def _check_shared(model: Any, targets: str | tuple[str, ...]) -> None:
    """Refuse an adapter beside the embedding's own weights: merged, its update would change the embedding too."""
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight or targets == "all-linear":
        return
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if module is head]
    shared = [name for name in names if name in targets]
    if shared:
        raise ConfigError(
            f"lora.targets: {shared[0]!r} has the weights of the embedding, which its update would change when it is "
            "merged; remove it from the targets"
        )
