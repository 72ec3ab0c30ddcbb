"""What all ranks do as one: an error of any of them is raised on all, so that none waits for one that has given up.

Without a process group a process is alone, and all of this is a plain call. What is exchanged goes over gloo, in a
group of its own; a thread that runs beside the training needs a `Channel`, for in a group all ranks speak in one order.
"""

import socket
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import torch.distributed as dist

from llmt_shared import errors
from llmt_shared.errors import LlmtError
from llmt_train.parallel.patience import as_patient_as_all

T = TypeVar("T")
R = TypeVar("R")


class Failure(NamedTuple):
    """An error of a rank, as the others are told."""

    host: str
    kind: str
    text: str
    errno: int | None = None
    filename: str | None = None


def num_ranks() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rank() -> int:
    """Return which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(function: Callable[[], T]) -> T:
    """Call a function on every rank; return what it returned here.

    Raises:
        Exception: of the first rank where the function failed; with several ranks its message names rank and host.
    """
    if num_ranks() == 1:
        return function()
    result: T | None = None
    cause: Exception | None = None
    try:
        result = function()
    except Exception as error:
        cause = error
    for rank, failure in enumerate(exchanged(None if cause is None else _describe(cause))):
        if failure is not None:
            raise _rebuilt(rank, failure) from (cause if rank == own_rank() else None)
    return cast("T", result)


def together(function: Callable[[], T]) -> list[T]:
    """Call a function on every rank; return what each returned, by rank, or raise as `agreed`."""
    return exchanged(agreed(function))


def by_first(function: Callable[[], T]) -> T:
    """Call a function on the first rank alone; return there and everywhere what it returned, or raise as `agreed`."""
    return cast("T", together(lambda: function() if own_rank() == 0 else None)[0])


def exchanged(value: T) -> list[T]:
    """Return every rank's value, by rank."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value, group=control_group())
    return values


def told_first(value: T) -> list[T] | None:
    """Return every rank's value, by rank, on the first one; ``None`` elsewhere."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] | None = [None] * num_ranks() if own_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=control_group())
    return values


def divided(value: T, divide: Callable[[list[T]], list[R]]) -> R:
    """Give every rank its part of what the first one makes of all their values, or raise as `agreed`."""
    values = told_first(value)
    parts = agreed(lambda: None if values is None else divide(values))
    if num_ranks() == 1:
        assert parts is not None
        return parts[0]
    own: list[Any] = [None]
    dist.scatter_object_list(own, parts, src=0, group=control_group())
    return cast("R", own[0])


class Channel:
    """A group of its own for a thread: while it is entered, what that thread exchanges goes over it."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    def __enter__(self) -> None:
        """Of this thread alone: others have values of their own."""
        self._token = _own_group.set(self._group)

    def __exit__(self, *_: object) -> None:
        """Back to the group that was there."""
        _own_group.reset(self._token)


def new_channel() -> Channel:
    """Make a channel; all ranks together, in their main threads."""
    return Channel(_new_group() if num_ranks() > 1 else None)


_own_group: ContextVar[dist.ProcessGroup | None] = ContextVar("group", default=None)


def control_group() -> dist.ProcessGroup:
    """Return the group that these functions use; every rank makes it at the same moment, on first use."""
    world = dist.group.WORLD
    assert world is not None
    return _own_group.get() or _group_beside(world)


@lru_cache(maxsize=1)
def _group_beside(world: dist.ProcessGroup) -> dist.ProcessGroup:
    del world  # a new one has a new group
    return _new_group()


def _new_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return as_patient_as_all(group)


def _describe(error: Exception) -> Failure:
    kind, text = type(error).__name__, str(error)
    if isinstance(error, OSError) and error.errno is not None:
        filename = None if error.filename is None else str(error.filename)
        return Failure(socket.gethostname(), "OSError", error.strerror or text, error.errno, filename)
    return Failure(socket.gethostname(), kind, text)


def _rebuilt(rank: int, failure: Failure) -> Exception:
    where = f"rank {rank} on {failure.host}"
    if failure.errno is not None:
        return OSError(failure.errno, f"{failure.text} ({where})", failure.filename)
    known = getattr(errors, failure.kind, None)
    if isinstance(known, type) and issubclass(known, LlmtError):
        return known(f"{failure.text} ({where})")
    return RuntimeError(f"{where}: {failure.kind}: {failure.text}")
