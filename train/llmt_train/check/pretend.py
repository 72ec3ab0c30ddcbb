"""One rank of a layout whose other ranks are not there: to ask what it would hold, on tensors without content.

torch.distributed keeps its state in one object, which is exchanged for a while: so a process asks for any layout,
whatever group it is part of itself. What ranks would send each other goes nowhere.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg as fake  # makes the backend "fake" known
from torch._C._distributed_c10d import _register_process_group, _resolve_process_group
from torch.distributed import distributed_c10d

from llmt_train.parallel.layout import Layout
from llmt_train.parallel.mesh import Mesh, build_mesh

T = TypeVar("T")

_FIRST_NAME = 1 << 20
"""Groups are numbered, also where those of this process are known by their numbers."""


def as_rank(layout: Layout, rank: int, function: Callable[[Mesh], T]) -> T:
    """Call a function as a rank of a layout would; its mesh is of CPUs."""

    def run() -> T:
        with _elsewhere():
            _make_known_again()
            default, mesh = _place(layout, rank)
            _elsewhere_state.default_pg = default
            return function(mesh)

    return _thread().submit(run).result()


@cache
def _thread() -> ThreadPoolExecutor:
    """Where all of this runs: by thread torch remembers what becomes of DTensors, by what their mesh looks like.

    One for all calls, for torch 2.11 does not survive the end of a thread that has seen DTensors.
    """
    return ThreadPoolExecutor(1)


@cache
def _place(layout: Layout, rank: int) -> tuple[Any, Mesh]:
    """Make all groups of a rank: its world, and its mesh. They stay, for torch remembers meshes."""
    _elsewhere_state.default_pg = None
    dist.init_process_group("fake", store=fake.FakeStore(), rank=rank, world_size=layout.world)
    return _elsewhere_state.default_pg, build_mesh(layout, "cpu")


def _make_known_again() -> None:
    """Tell torch the groups' names again: the end of a process's own group makes it forget all that it knew."""
    for group, name in _elsewhere_state.pg_names.items():
        try:
            _resolve_process_group(name)
        except RuntimeError:
            _register_process_group(name, group)


@contextmanager
def _elsewhere() -> Iterator[None]:
    c10d: Any = distributed_c10d
    levels: Any = dist
    kept = {name: getattr(c10d, name) for name in ("_world", "_backend", "_default_pg_init_method")}
    hook, level = sys.excepthook, levels.get_debug_level()
    c10d._world = _elsewhere_state
    try:
        levels.set_debug_level(levels.DebugLevel.OFF)  # in detail, groups would look for their members
        yield
    finally:
        levels.set_debug_level(level)
        sys.excepthook = hook
        for name, value in kept.items():
            setattr(c10d, name, value)


class _Groups:
    """What torch.distributed knows of its groups, in the words of its own `_World`."""

    def __init__(self) -> None:
        self.default_pg: Any = None
        self.group_count = _FIRST_NAME
        self.comms: list[Any] = []
        self.pg_map: dict[Any, Any] = {}
        self.pg_names: dict[Any, Any] = {}
        self.pg_group_ranks: dict[Any, Any] = {}
        self.pg_backend_config: dict[Any, Any] = {}
        self.pg_coalesce_state: dict[Any, Any] = {}
        self.pg_to_tag: dict[Any, Any] = {}
        self.tags_to_pg: dict[Any, Any] = {}


_elsewhere_state = _Groups()
