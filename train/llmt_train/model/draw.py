"""Weights drawn as transformers draws them, a piece at a time: no more than one layer is ever whole in memory."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

Take = Callable[[str, Tensor], None]
"""Is given a name of `state_dict` (or of a buffer outside of it) and the tensor, which is gone afterwards."""


@torch.no_grad()
def draw(skeleton: Any, seed: int, take: Take) -> None:
    """Draw a model's parameters, and set its buffers, on the CPU in full size: the same bits for a seed, always.

    They are the bits that transformers' `initialize_weights` gives the whole model. Of tied weights one is drawn.

    Args:
        skeleton: the whole model on the meta device; it is left there.
        seed: torch's own generator is left as it was.
        take: is called for every tensor, in the model's order.

    Raises:
        ValueError: transformers has no rule for a parameter, or none that works on a part of the model.
    """
    tied = skeleton.all_tied_weights_keys
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), guard_torch_init_functions():
        torch.manual_seed(seed)
        for prefix, unit, owner, is_whole in _units(skeleton):
            _materialise(unit, prefix, tied, recurse=is_whole)
            if is_whole:
                _initialise(unit, owner)
            else:
                _initialise_outer(prefix, unit, owner)
            _hand_over(unit, prefix, tied, take, recurse=is_whole)
            unit.to_empty(device="meta", recurse=is_whole)


@torch.no_grad()
def draw_whole(build: Callable[[], Any], seed: int, take: Take) -> None:
    """Draw a model as transformers builds it, whole in memory: for those that `draw` cannot draw.

    Args:
        build: returns the model with weights drawn from torch's own generator.
        seed: as `draw`.
        take: as `draw`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    for name, tensor in _tensors(model, recurse=True):
        take(name, tensor)


@torch.no_grad()
def set_buffers(skeleton: Any, take: Take) -> None:
    """Set a model's buffers, as far as they follow from its config, on the CPU.

    Args:
        skeleton: the whole model, on the meta device or with parameters that are left alone; its buffers are real
            afterwards.
        take: is called for every buffer.
    """
    for parameter in skeleton.parameters():
        parameter._is_hf_initialized = True  # transformers' rules leave it alone then
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), guard_torch_init_functions():
        for prefix, module, owner in _with_owners(skeleton):
            names = [name for name, _ in module.named_buffers(recurse=False)]
            for name in names:
                module._buffers[name] = _unset(torch.empty_like(module.get_buffer(name), device="cpu"))
            if names:
                owner._init_weights(module)
            for name in names:
                if _is_set(module.get_buffer(name)):
                    take(f"{prefix}{name}", module.get_buffer(name))


def _with_owners(module: nn.Module, prefix: str = "", owner: Any = None) -> Iterator[tuple[str, nn.Module, Any]]:
    """All modules, children first, with the transformers model whose rules are for them."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    for name, child in module.named_children():
        yield from _with_owners(child, f"{prefix}{name}.", owner)
    yield prefix, module, owner


def _units(module: nn.Module, prefix: str = "", owner: Any = None) -> Iterator[tuple[str, nn.Module, Any, bool]]:
    """Pieces of a model in transformers' order: layers whole, what holds them by itself.

    A rule for a module may set its children's weights, as GPT-2's for attention does: a layer must be whole.
    """
    owner = module if isinstance(module, PreTrainedModel) else owner
    if not any(isinstance(child, nn.ModuleList) for child in module.modules()):
        yield prefix, module, owner, True
        return
    for name, child in module.named_children():
        inner = child.named_children() if isinstance(child, nn.ModuleList) else None
        if inner is None:
            yield from _units(child, f"{prefix}{name}.", owner)
            continue
        for number, layer in inner:
            yield f"{prefix}{name}.{number}.", layer, layer if isinstance(layer, PreTrainedModel) else owner, True
    yield prefix, module, owner, False


def _materialise(unit: nn.Module, prefix: str, tied: Mapping[str, str], *, recurse: bool) -> None:
    unit.to_empty(device="cpu", recurse=recurse)
    for name, tensor in _tensors(unit, recurse):
        _unset(tensor)
        if f"{prefix}{name}" in tied:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # drawn under its other name


def _unset(tensor: Tensor) -> Tensor:
    """Mark what no rule has written yet."""
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()


def _is_set(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or not tensor.isnan().any().item()


def _initialise(module: nn.Module, owner: Any) -> None:
    for child in module.children():
        _initialise(child, child if isinstance(child, PreTrainedModel) else owner)
    owner._init_weights(module)


def _initialise_outer(prefix: str, module: nn.Module, owner: Any) -> None:
    """Apply the rule for a module whose children are not there any more."""
    before = [tensor._version for tensor in module.parameters() if tensor.is_meta]
    owner._init_weights(module)
    if before != [tensor._version for tensor in module.parameters() if tensor.is_meta]:
        raise ValueError(f"transformers draws weights of the parts of {prefix or 'the model'} all at once")


def _hand_over(unit: nn.Module, prefix: str, tied: Mapping[str, str], take: Take, *, recurse: bool) -> None:
    for name, tensor in _tensors(unit, recurse):
        if f"{prefix}{name}" in tied:
            continue
        if not _is_set(tensor):
            raise ValueError(f"transformers does not say how {prefix}{name} begins")
        take(f"{prefix}{name}", tensor)


def _tensors(unit: nn.Module, recurse: bool) -> Iterator[tuple[str, Tensor]]:
    yield from unit.named_parameters(recurse=recurse)
    yield from unit.named_buffers(recurse=recurse)
