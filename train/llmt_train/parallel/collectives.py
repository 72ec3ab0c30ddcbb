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


def copy_in(x: Tensor, axis: Axis) -> Tensor:
    """Hand what all ranks hold alike to their own parts of a layer: identity; gradients are summed."""
    return x if axis.size == 1 else _apply(_CopyIn, x, axis)


def sum_out(x: Tensor, axis: Axis) -> Tensor:
    """Sum what the parts of a layer give, for all ranks to use alike; the gradient is each one's own."""
    return x if axis.size == 1 else _apply(_SumOut, x, axis)


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Join the ranks' parts along a dim, for each to use in its own way; gradients are summed and cut."""
    return x if axis.size == 1 else _apply(_Gather, x, axis, dim % x.ndim)


def scatter_sum(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Sum over the ranks and keep the own part along a dim; gradients are joined."""
    return x if axis.size == 1 else _apply(_ScatterSum, x, axis, dim % x.ndim)


def split(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Keep the own part, along a dim, of what all ranks hold alike; gradients are joined."""
    return x if axis.size == 1 else _apply(_Split, x, axis, dim % x.ndim)


def gather_same(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Join the ranks' parts along a dim, for all to use alike; the gradient is the own part of each one's."""
    return x if axis.size == 1 else _apply(_GatherSame, x, axis, dim % x.ndim)


def total(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the ranks, for each to use for its own share of the loss; gradients are summed too."""
    return x if axis.size == 1 else _apply(_Total, x, axis)


def swap(x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
    """Exchange which dim is shared out: cut ``split_dim``, whole until now, and join ``concat_dim`` (all-to-all)."""
    return x if axis.size == 1 else _apply(_Swap, x, axis, split_dim % x.ndim, concat_dim % x.ndim)


def _apply(function: Any, *arguments: Any) -> Tensor:
    return cast("Tensor", function.apply(*arguments))


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


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.axis), None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _summed(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _joined(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _summed_part(grad, ctx.axis, ctx.dim), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _summed_part(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _joined(grad, ctx.axis, ctx.dim), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _own(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _joined(grad, ctx.axis, ctx.dim), None, None


class _GatherSame(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _joined(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _own(grad, ctx.axis, ctx.dim), None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _summed(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.axis), None


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
        ctx.axis, ctx.split_dim, ctx.concat_dim = axis, split_dim, concat_dim
        return _swapped(x, axis, split_dim, concat_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _swapped(grad, ctx.axis, ctx.concat_dim, ctx.split_dim), None, None, None
