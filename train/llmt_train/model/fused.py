"""Fused projections as layers of their own, so that each can be shared out over devices (Phi-3's qkv and gate_up).

The model is split in memory; on disk, and for everybody else, its layers stay fused. Its logits are the same to the
last bit. Names of parameters in checkpoints are those of the split model, for every layout.
"""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmt_train.model.recompute import layers_of
from llmt_train.parallel.plans import Fused, Part, plan_of


class Rows(NamedTuple):
    """Where a parameter lies on disk: ``tensor[first:last]``."""

    name: str
    first: int
    last: int


def split_fused(model: Any) -> int:
    """Replace fused layers by their parts; return how many there were: 0 where the family has none, or is split.

    Args:
        model: with weights, or on the meta device.
    """
    plan = plan_of(model.config)
    if plan is None or not plan.fused:
        return 0
    layers = layers_of(model, "parallel.tp")
    return sum(_split(layer, fused, model.config) for layer in layers for fused in plan.fused)


def parts_of(config: Any, name: str) -> Rows | None:
    """Return which rows of which fused tensor a parameter of a split model is; ``None`` for one that is not a part.

    Args:
        config: the model's.
        name: as ``model.layers.0.self_attn.q_proj.weight``.
    """
    for fused in _fused(config):
        first = 0
        for part in fused.parts:
            last = first + part.rows(config)
            layer, found, kind = name.rpartition(f".{part.name}.")
            if found:
                return Rows(f"{layer}.{fused.name}.{kind}", first, last)
            first = last
    return None


def disk_names(config: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """Group parameters of a split model by the tensors that they are on disk, in the order of their rows there.

    A parameter that is no part of a fused one is alone in its group.
    """
    groups: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        rows = parts_of(config, name)
        key, first = (name, 0) if rows is None else (rows.name, rows.first)
        groups.setdefault(key, []).append((first, name))
    return {key: [name for _, name in sorted(group)] for key, group in groups.items()}


def _fused(config: Any) -> tuple[Fused, ...]:
    plan = plan_of(config)
    return () if plan is None else plan.fused


def _split(layer: nn.Module, fused: Fused, config: Any) -> bool:
    place, _, name = fused.name.rpartition(".")
    module: Any = layer.get_submodule(place)
    linear = module._modules.pop(name, None)
    if linear is None:
        return False
    first = 0
    for part in fused.parts:
        last = first + part.rows(config)
        setattr(module, _last(part), _rows_of(linear, first, last))
        first = last
    assert first == linear.out_features, f"{fused.name}: {linear.out_features} rows, of which {first} have a part"
    if place == "mlp":
        module.forward = MethodType(_gated, module)
    else:
        # A method: a copy of the module gets one of its own. The layer's own forward cuts its result again.
        setattr(module, name, MethodType(_beside([_last(part) for part in fused.parts]), module))
    return True


def _last(part: Part) -> str:
    return part.name.rpartition(".")[2]


def _rows_of(linear: nn.Linear, first: int, last: int) -> nn.Linear:
    part = nn.Linear(linear.in_features, last - first, linear.bias is not None, device="meta")
    for name, parameter in linear.named_parameters():
        rows = parameter.detach()[first:last].clone()
        setattr(part, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    return part.train(linear.training)


def _beside(names: list[str]) -> Callable[..., Tensor]:
    """What the fused layer gave: the parts' results side by side."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in names], dim=-1)

    return forward


def _gated(self: Any, hidden_states: Tensor) -> Tensor:
    """Phi-3's MLP, without laying gate and up side by side only to cut them again."""
    output: Tensor = self.down_proj(self.up_proj(hidden_states) * self.activation_fn(self.gate_proj(hidden_states)))
    return output
