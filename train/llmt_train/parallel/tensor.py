"""Sharing the layers of a model out over the ranks of the tp axis, by its family's plan.

Parameters become DTensors on the tp mesh, for storage: FSDP, clipping, optimizers and checkpoints see one kind. What
is computed is computed on plain local tensors, which take the parameters' names while a module's ``forward`` runs; so
kernels, compilation and checkpointing know nothing of it. Ranks speak by `collectives`, where tokens enter attention
and MLP and where these leave (Shoeybi et al. 2019, arXiv:1909.08053). With sequence parallel every rank holds, between
the layers, the hidden states of its own tokens only (Korthikanti et al. 2022, arXiv:2205.05198).

Shape legend: N packed tokens, n those that a rank holds between layers (N, or N / tp with sequence parallel), H hidden
size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from copy import copy
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from llmt_shared.errors import ConfigError
from llmt_train.model.recompute import layers_of
from llmt_train.parallel.collectives import copy_in, enter, gather_same, scatter_sum, split, sum_out, total
from llmt_train.parallel.mesh import Axis, Mesh
from llmt_train.parallel.plans import Plan, check_plan, shares_vocabulary

Forward = Callable[..., Any]


class _Lie(NamedTuple):
    """How a parameter lies over the ranks."""

    placement: Placement
    is_summed: bool = False
    """Every rank makes a gradient of its own tokens or heads; otherwise a part's is whole, and of a whole one alike."""


_ROWS = _Lie(Shard(0))
_COLUMNS = _Lie(Shard(1))
_ALIKE = _Lie(Replicate())
_SUMMED = _Lie(Replicate(), is_summed=True)


class _Role(NamedTuple):
    """What a module does with its parameters."""

    lies: dict[str, _Lie]
    change: Callable[[Forward], Forward] | None = None
    """Makes the module's ``forward`` from the one it has, which reads local parameters."""


def tensor_parallel(model: Any, mesh: Mesh, *, sp: bool) -> None:
    """Share a model out over ``mesh.tp``; nothing to do where that is one rank. Then comes `fully_shard`.

    Args:
        model: from `load_model`, whole on every rank, its fused layers split (`split_fused`); with weights or on the
            meta device.
        mesh: this rank's.
        sp: share out what lies between layers too, by tokens: their number must divide by tp, and
            ``last_hidden_state`` is then [1, N / tp, H], to be read through `enter`.

    Raises:
        ConfigError: the family has no plan, its heads or features do not divide, or it has modules that the plan does
            not know.
    """
    axis = mesh.tp
    if axis.size == 1:
        return
    plan = check_plan(model.config, axis.size)
    assert mesh.parameters is not None  # there is more than one rank
    roles = _roles(model, plan, axis, sp)
    done: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            role = roles.get(module) or _norm_role(name, module, sp)
            _distribute(module, role, axis, mesh.parameters["tp"], done)
            _change(module, _with_local(role, axis))
    layers = layers_of(model, "parallel.tp")
    for module in [layer.get_submodule(name) for layer in layers for name in plan.entries]:
        _change(module, _entering(axis, sp))
        if hasattr(module, "num_key_value_heads"):
            _count_own_heads(module, axis.size)
    if sp:
        layers[0].register_forward_pre_hook(_own_tokens(axis), with_kwargs=True)
        _change(model, _whole_logits)


def local(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter, as a plain tensor with a gradient.

    Args:
        parameter: of a module that is whole but for tp: inside FSDP's forward, or without FSDP.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    assert parameter.device_mesh.ndim == 1, f"{parameter.placements}: outside of the model's forward"
    return parameter.to_local()


def _roles(model: Any, plan: Plan, axis: Axis, sp: bool) -> dict[nn.Module, _Role]:
    """What modules do, but for the norms of hidden states."""
    by_name = {
        **dict.fromkeys(plan.column, _Role({"weight": _ROWS, "bias": _ROWS})),
        **dict.fromkeys(plan.row, _Role({"weight": _COLUMNS, "bias": _of_tokens(sp)}, _leaving(axis, sp))),
        **dict.fromkeys(plan.head_norms, _Role({"weight": _SUMMED})),
        **dict.fromkeys(plan.projection_norms, _Role({"weight": _ROWS}, _norm_of_shares(axis))),
    }
    roles = {}
    for layer in layers_of(model, "parallel.tp"):
        for name, role in by_name.items():
            roles[_submodule(model, layer, name)] = role
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module, make in ((embedding, _embedding_role), (head, _head_role)):
        is_shared = shares_vocabulary(module.weight.shape[0], axis.size)
        roles[module] = make(axis, sp, is_shared)
    return roles


def _of_tokens(sp: bool) -> _Lie:
    """How a parameter lies that is applied to tokens between the layers."""
    return _SUMMED if sp else _ALIKE


def _submodule(model: Any, layer: nn.Module, name: str) -> nn.Module:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        raise ConfigError(
            f"parallel.tp: {model.config.model_type} has no {name} in its {type(layer).__name__}, as its plan for "
            "sharing out layers wants it; set `parallel: {tp: 1}`, and please report your version of transformers"
        ) from None


def _norm_role(name: str, module: nn.Module, sp: bool) -> _Role:
    if not type(module).__name__.endswith("Norm"):
        raise ConfigError(
            f"parallel.tp: the plan for sharing out layers does not know {name} ({type(module).__name__}); set "
            "`parallel: {tp: 1}`, and please report the model"
        )
    return _Role(dict.fromkeys(("weight", "bias"), _of_tokens(sp)))


def _embedding_role(axis: Axis, sp: bool, is_shared: bool) -> _Role:
    """Its result is whole also with sp, for noise and factors that come next; the first layer cuts it."""
    del sp
    return _Role({"weight": _ROWS}, _own_ids(axis)) if is_shared else _Role({"weight": _ALIKE})


def _head_role(axis: Axis, sp: bool, is_shared: bool) -> _Role:
    lie = _ROWS if is_shared else _ALIKE
    return _Role({"weight": lie, "bias": lie}, _logits(axis, sp, is_shared))


def _distribute(module: nn.Module, role: _Role, axis: Axis, mesh: DeviceMesh, done: dict[int, nn.Parameter]) -> None:
    """Make the module's parameters DTensors of which this rank holds its part."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if id(parameter) not in done:
            placement, data = role.lies[name].placement, parameter.detach()
            if isinstance(placement, Shard):
                data = data.chunk(axis.size, placement.dim)[axis.rank].clone(memory_format=torch.contiguous_format)
            whole = DTensor.from_local(data, mesh, [placement], run_check=False)
            done[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        module.register_parameter(name, done[id(parameter)])


def _change(module: nn.Module, change: Callable[[Forward], Forward]) -> None:
    # A method: a copy of the module gets one of its own.
    module.forward = MethodType(change(cast("Any", module.forward).__func__), module)


def _with_local(role: _Role, axis: Axis) -> Callable[[Forward], Forward]:
    """Run a ``forward`` while local tensors stand where the parameters are read."""

    def change(inner: Forward) -> Forward:
        changed = inner if role.change is None else role.change(inner)

        @wraps(inner)
        def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
            held = {name: p for name, p in self._parameters.items() if p is not None}
            for name, parameter in held.items():
                own = local(parameter)
                # Found before the parameter, which stays where it is.
                self.__dict__[name] = _summed(own, axis) if role.lies[name].is_summed else own
            try:
                return changed(self, *arguments, **keywords)
            finally:
                for name in held:
                    del self.__dict__[name]

        return forward

    return change


def _summed(parameter: Tensor, axis: Axis) -> Tensor:
    """The same, its gradient summed over ranks: in at least fp32, whatever is computed in."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return copy_in(parameter.to(dtype), axis).to(parameter.dtype)


def _count_own_heads(attention: Any, tp: int) -> None:
    """Phi-3's attention finds queries, keys and values in one tensor by their numbers."""
    attention.num_key_value_heads //= tp
    attention.config = copy(attention.config)
    attention.config.num_attention_heads //= tp
    attention.config.num_key_value_heads //= tp


def _entering(axis: Axis, sp: bool) -> Callable[[Forward], Forward]:
    """Attention and MLP read all tokens."""

    def change(inner: Forward) -> Forward:
        @wraps(inner)
        def forward(self: nn.Module, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
            return inner(self, enter(hidden_states, axis, sp), *arguments, **keywords)

        return forward

    return change


def _leaving(axis: Axis, sp: bool) -> Callable[[Forward], Forward]:
    """Sum what the shares of a layer give; its bias is added once."""

    def change(inner: Forward) -> Forward:
        @wraps(inner)
        def forward(self: Any, x: Tensor) -> Tensor:
            share = nn.functional.linear(x, self.weight)
            out = scatter_sum(share, axis, -2) if sp else sum_out(share, axis)
            return out if self.bias is None else out + self.bias.to(out.dtype)

        return forward

    return change


def _norm_of_shares(axis: Axis) -> Callable[[Forward], Forward]:
    """OLMo-2's norm over all heads, of which a rank has a share: the mean square is one number for all of them."""

    def change(inner: Forward) -> Forward:
        @wraps(inner)
        def forward(self: Any, hidden_states: Tensor) -> Tensor:
            x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
            mean_square = total(x.pow(2).sum(-1, keepdim=True), axis) / (x.shape[-1] * axis.size)
            normed = x * torch.rsqrt(mean_square + self.variance_epsilon)
            return cast("Tensor", (self.weight * normed).to(hidden_states.dtype))

        return forward

    return change


def _own_ids(axis: Axis) -> Callable[[Forward], Forward]:
    """Look up the ids whose rows this rank has; the others' ranks give theirs."""

    def change(inner: Forward) -> Forward:
        @wraps(inner)
        def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
            num_rows = self.weight.shape[0]
            ids = input - axis.rank * num_rows
            is_own = (ids >= 0) & (ids < num_rows)
            padding = self.padding_idx
            try:
                self.padding_idx = _own_padding(padding, axis.rank, num_rows)
                found = inner(self, ids.where(is_own, 0))
            finally:
                self.padding_idx = padding
            return sum_out(found.where(is_own[..., None], 0), axis)

        return forward

    return change


def _own_padding(padding: int | None, rank: int, num_rows: int) -> int | None:
    """Where the row without a gradient is among a rank's own."""
    if padding is None or padding // num_rows != rank:
        return None
    return padding % num_rows


def _logits(axis: Axis, sp: bool, is_shared: bool) -> Callable[[Forward], Forward]:
    """All tokens' logits, of the whole vocabulary, alike on all ranks: [1, n, H] to [1, N, V]."""

    def change(inner: Forward) -> Forward:
        @wraps(inner)
        def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
            hidden = _keep(enter(input, axis, sp, is_shared=is_shared), self.__dict__.get(_KEPT, 0))
            logits: Tensor = inner(self, hidden)
            return gather_same(logits, axis, -1) if is_shared else logits

        return forward

    return change


_KEPT = "logits_to_keep"


def _whole_logits(inner: Forward) -> Forward:
    """Let the output layer choose which tokens' logits are wanted, for before it no rank has them all."""

    @wraps(inner)
    def forward(self: Any, *arguments: Any, logits_to_keep: int | Tensor = 0, **keywords: Any) -> Any:
        head = self.get_output_embeddings()
        head.__dict__[_KEPT] = logits_to_keep
        try:
            return inner(self, *arguments, **keywords)
        finally:
            del head.__dict__[_KEPT]

    return forward


def _keep(hidden_1NH: Tensor, kept: int | Tensor) -> Tensor:
    """As transformers does: the last ``kept`` tokens, or all where that is 0; or those at the given places."""
    return hidden_1NH[:, slice(-kept, None) if isinstance(kept, int) else kept]


def _own_tokens(axis: Axis) -> Callable[..., tuple[tuple[Any, ...], Mapping[str, Any]]]:
    def hook(
        module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        del module
        hidden, *rest = arguments
        return (split(hidden, axis, -2), *rest), keywords

    return hook
