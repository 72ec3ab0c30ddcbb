"""A rank that is not there: what it sees, and what it leaves behind in a process that is somebody."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from train.parallel.ranks import on_ranks

from llmt_train.check.pretend import as_rank
from llmt_train.parallel.layout import Layout, Place
from llmt_train.parallel.mesh import Mesh, build_mesh
from llmt_train.parallel.optim import whole
from llmt_train.parallel.sharding import shard


def test_a_rank_stands_where_its_layout_says():
    layout = Layout(replicate=2, shard=4, cp=2, tp=4)
    mesh = as_rank(layout, 37, lambda mesh: mesh)
    assert mesh.place == Place(replicate=1, shard=0, cp=1, tp=1)
    assert (mesh.tp.size, mesh.cp.size, mesh.dp.size, mesh.averaged.size) == (4, 2, 8, 16)
    assert (mesh.tp.rank, mesh.dp.rank) == (1, 4)


def test_a_process_without_a_group_has_none_afterwards():
    hook, had_one = sys.excepthook, dist.is_initialized()
    as_rank(Layout(shard=8), 0, lambda mesh: None)
    assert (sys.excepthook, dist.is_initialized()) == (hook, had_one)


def test_what_fails_inside_is_raised_and_leaves_nothing():
    def fail(mesh: Mesh) -> None:
        raise ValueError("inside")

    had_one = dist.is_initialized()
    with pytest.raises(ValueError, match="inside"):
        as_rank(Layout(shard=8), 0, fail)
    assert dist.is_initialized() == had_one


def somebody() -> tuple[int, list[float]]:
    """A real rank that pretends to be others, of equal and of other layouts, before and after it uses its own group."""
    mesh, model = build_mesh(Layout(shard=2), "cpu"), torch.nn.Linear(2, 4, bias=False)
    torch.nn.init.constant_(model.weight, dist.get_rank() + 1.0)
    for layout in (Layout(shard=2), Layout(shard=8, tp=2)):
        as_rank(layout, 0, _looks)
    shard(model, mesh)
    as_rank(Layout(shard=2), 1, _looks)
    total = torch.ones(1)
    dist.all_reduce(total)
    return dist.get_world_size(), [*whole(model.weight).sum(1).tolist(), *total.tolist()]


def _looks(mesh: Mesh) -> None:
    local = DTensor.from_local(torch.ones(2, 2), mesh.fsdp, run_check=False)
    whole(local.add(local))


def test_a_process_that_is_somebody_stays_it():
    """Each rank gives its half of the rows: the first those of rank 0, which are ones."""
    assert on_ranks(2, somebody) == [(2, [2.0, 2.0, 4.0, 4.0, 2.0])] * 2
