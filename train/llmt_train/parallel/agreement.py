"""What ranks tell one another: sums, lists, and the word of the first."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from llmt_train.parallel.mesh import Axis, is_first

T = TypeVar("T")


def from_first(function: Callable[[], T]) -> T:
    """Call a function on the first rank alone; every rank returns what it gave, or raises its error."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    answer: list[Any] = [None, None]
    if is_first():
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    result, failure = answer
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def summed(tensor: Tensor, axis: Axis) -> Tensor:
    """Return the sum over an axis; no gradient passes."""
    tensor = tensor.detach().clone()
    if axis.group is not None:
        dist.all_reduce(tensor, group=axis.group)
    return tensor


def gathered(value: T, axis: Axis) -> list[T]:
    """Return the values of all ranks of an axis, in their order."""
    if axis.group is None:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values
