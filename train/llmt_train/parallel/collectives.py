"""What ranks of an axis exchange, with gradients; every function is the identity on an axis of one rank.

Two kinds. Where ranks hold parts of one thing, and the loss is the sum of what all ranks make of them, backward is the
true adjoint: `gather` and `scatter_sum`, `swap`, `total`. Where ranks hold the same thing, their losses are one loss
that all compute, and it must count once: `copy_in` and `sum_out` (Megatron's f and g: Shoeybi et al. 2019,
arXiv:1909.08053), `split` and `gather_same`. Sequence parallel is `gather` and `scatter_sum` instead of `copy_in` and
`sum_out` (Korthikanti et al. 2022, arXiv:2205.05198).

A dim must divide by the axis. All results are contiguous and own their memory.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from llmt_train.parallel.mesh import Axis

# torch 2.13 renamed them and deprecates the names that 2.11 has.
_all_gather = cast("Callable[..., Any]", getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)
_reduce_scatter = cast("Callable[..., Any]", getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)

Operation = Callable[..., Tensor]
"""Of a tensor, an axis and dims."""
Dims = tuple[int, ...]


def copy_in(x: Tensor, axis: Axis) -> Tensor:
    """Hand what all ranks hold alike to their own parts of a layer: identity; gradients are summed."""
    return x if axis.size == 1 else _exchanged(x, axis, _same, (), _summed, ())


def sum_out(x: Tensor, axis: Axis) -> Tensor:
    """Sum what the parts of a layer give, for all ranks to use alike; the gradient is each one's own."""
    return x if axis.size == 1 else _exchanged(x, axis, _summed, (), _same, ())


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Join the ranks' parts along a dim, for each to use in its own way; gradients are summed and cut."""
    return x if axis.size == 1 else _exchanged(x, axis, _joined, (dim,), _summed_part, (dim,))


def scatter_sum(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Sum over the ranks and keep the own part along a dim; gradients are joined."""
    return x if axis.size == 1 else _exchanged(x, axis, _summed_part, (dim,), _joined, (dim,))


def split(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Keep the own part, along a dim, of what all ranks hold alike; gradients are joined."""
    return x if axis.size == 1 else _exchanged(x, axis, _own, (dim,), _joined, (dim,))


def gather_same(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Join the ranks' parts along a dim, for all to use alike; the gradient is the own part of each one's."""
    return x if axis.size == 1 else _exchanged(x, axis, _joined, (dim,), _own, (dim,))


def total(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the ranks, for each to use for its own share of the loss; gradients are summed too."""
    return x if axis.size == 1 else _exchanged(x, axis, _summed, (), _summed, ())


def swap(x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
    """Exchange which dim is shared out: cut ``split_dim``, whole until now, and join ``concat_dim`` (all-to-all)."""
    dims = (split_dim % x.ndim, concat_dim % x.ndim)
    return x if axis.size == 1 else _exchanged(x, axis, _swapped, dims, _swapped, dims[::-1])


def enter(hidden: Tensor, axis: Axis, sp: bool, *, is_shared: bool = True) -> Tensor:
    """Return all tokens' hidden states, for what reads them with weights of its own: [.., n, H] to [.., N, H].

    Args:
        hidden: as they lie between layers; of the decoder, ``last_hidden_state``.
        axis: ranks that share layers.
        sp: whether they share the tokens between the layers too.
        is_shared: whether the ranks share out what comes next. Not where the output layer is whole on every rank (see
            `shares_vocabulary`): then all compute the same of it.
    """
    if is_shared:
        return gather(hidden, axis, -2) if sp else copy_in(hidden, axis)
    return gather_same(hidden, axis, -2) if sp else hidden


def _exchanged(x: Tensor, axis: Axis, forth: Operation, dims: Dims, back: Operation, back_dims: Dims) -> Tensor:
    return cast("Tensor", _Exchange.apply(x, axis, forth, dims, back, back_dims))  # type: ignore[no-untyped-call]


class _Exchange(torch.autograd.Function):
    """An operation on the ranks' tensors, and the one that is done with their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, axis: Axis, forth: Operation, dims: Dims, back: Operation, back_dims: Dims
    ) -> Tensor:
        ctx.axis, ctx.back, ctx.dims = axis, back, back_dims
        return forth(x, axis, *dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grad, ctx.axis, *ctx.dims), None, None, None, None, None


def _same(x: Tensor, axis: Axis) -> Tensor:
    del axis
    return x.view_as(x)


def _summed(x: Tensor, axis: Axis) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)  # what came in may be others' too
    dist.all_reduce(out, group=axis.group)
    return out


def _joined(x: Tensor, axis: Axis, dim: int) -> Tensor:
    part = x.movedim(dim, 0).contiguous()
    out = part.new_empty(axis.size * part.shape[0], *part.shape[1:])
    _all_gather(out, part, group=axis.group)
    return out.movedim(0, dim).contiguous()


def _summed_part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    whole = x.movedim(dim, 0).contiguous()
    out = whole.new_empty(_share(whole, axis, 0), *whole.shape[1:])
    _reduce_scatter(out, whole, group=axis.group)
    return out.movedim(0, dim).contiguous()


def _own(x: Tensor, axis: Axis, dim: int) -> Tensor:
    size = _share(x, axis, dim)
    return x.narrow(dim, axis.rank * size, size).clone(memory_format=torch.contiguous_format)


def _swapped(x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
    _share(x, axis, split_dim)
    parts = torch.stack(x.chunk(axis.size, split_dim))
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=axis.group)
    return out.movedim(0, concat_dim).flatten(concat_dim, concat_dim + 1).contiguous()


def _share(x: Tensor, axis: Axis, dim: int) -> int:
    assert x.shape[dim] % axis.size == 0, f"dim {dim} of {tuple(x.shape)} in {axis.size} parts"
    return x.shape[dim] // axis.size
