"""What ranks find out together: those of an axis, or all."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmt_train.parallel.mesh import Axis

T = TypeVar("T")


def summed(tensor: Tensor, axis: Axis) -> Tensor:
    """Return the sum over an axis; no gradient passes."""
    tensor = tensor.detach().clone()
    if axis.group is not None:
        dist.all_reduce(tensor, group=axis.group)
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, of which each rank may hold a part; all ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(value: T, axis: Axis) -> list[T]:
    """Return the values of all ranks of an axis, in their order."""
    if axis.group is None:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def largest(value: int) -> int:
    """Return the largest of the ranks' numbers, the same on all; every rank calls it at the same point.

    It costs one small all-reduce, and nothing where there is one process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    number = torch.tensor(value, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number.item())
