"""One rank of a layout whose other ranks are not there: to ask what it would hold, on tensors without content.

torch.distributed keeps its state in one object, which is exchanged for a while: so a process asks for any layout,
whatever group it is part of itself. What ranks would send each other goes nowhere.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg as fake  # makes the backend "fake" known
from torch.distributed import distributed_c10d as c10d

from llmt_train.parallel.layout import Layout
from llmt_train.parallel.mesh import Mesh, build_mesh

T = TypeVar("T")

_FIRST_NAME = 1 << 20
"""Groups are numbered, also where those of this process are known by their numbers."""


def as_rank(layout: Layout, rank: int, function: Callable[[Mesh], T]) -> T:
    """Call a function as a rank of a layout would; its mesh is of CPUs.

    In a thread of its own: torch remembers by thread, and by what a mesh looks like, what DTensors on it become.
    """

    def run() -> T:
        with _world(layout, rank):
            return function(build_mesh(layout, "cpu"))

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


@contextmanager
def _world(layout: Layout, rank: int) -> Iterator[None]:
    state: Any = c10d  # its own names for what must come back
    before = state._world, state._backend, state._default_pg_init_method, sys.excepthook
    world = state._world = _World()
    try:
        dist.init_process_group("fake", store=fake.FakeStore(), rank=rank, world_size=layout.world)
        yield
    finally:
        for name in world.pg_names.values():
            state._unregister_process_group(name)
        state._world, state._backend, state._default_pg_init_method, sys.excepthook = before


class _World:
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
