"""The groups of a layout."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from train.parallel.ranks import on_ranks

from llmt_train.parallel.layout import Layout, place_of, rank_of
from llmt_train.parallel.mesh import Axis, build_mesh
from llmt_train.parallel.together import control_group


def _sums(layout: Layout) -> dict[str, float]:
    mesh = build_mesh(layout, "cpu")
    return {name: _sum(getattr(mesh, name)) for name in ("tp", "cp", "dp", "averaged")}


def _sum(axis: Axis) -> float:
    value = torch.tensor(float(1 << dist.get_rank()))
    if axis.group is not None:
        dist.all_reduce(value, group=axis.group)
    return value.item()


def test_each_axis_joins_the_ranks_that_differ_in_it_alone():
    layout = Layout(1, 2, 1, 2)
    for rank, found in enumerate(on_ranks(4, _sums, layout)):
        place = place_of(layout, rank)
        tp = sum(1 << rank_of(layout, place._replace(tp=tp)) for tp in range(2))
        dp = sum(1 << rank_of(layout, place._replace(shard=shard)) for shard in range(2))
        assert found == {"tp": tp, "cp": 1 << rank, "dp": dp, "averaged": dp}


def test_context_parallel_ranks_are_averaged_over_but_read_the_same_rows():
    for rank, found in enumerate(on_ranks(2, _sums, Layout(1, 1, 2, 1))):
        assert found == {"tp": 1 << rank, "cp": 3, "dp": 1 << rank, "averaged": 3}


def _timeouts(seconds: int) -> set[timedelta]:
    _set_pg_timeout(timedelta(seconds=seconds))
    meshes = [build_mesh(layout, "cpu") for layout in (Layout(1, 1, 1, 2), Layout(1, 1, 2, 1), Layout(1, 2, 1, 1))]
    axes = [axis.group for mesh in meshes for axis in (mesh.tp, mesh.cp, mesh.dp, mesh.averaged)]
    groups = [group for mesh in meshes for group in mesh.parameters.get_all_groups()]
    backends = [group._get_backend(torch.device("cpu")) for group in [*axes, *groups, control_group()] if group]
    return {backend.options._timeout for backend in backends}


def test_ranks_wait_as_long_in_every_group_as_in_that_of_all():
    assert on_ranks(2, _timeouts, 77) == [{timedelta(seconds=77)}] * 2
