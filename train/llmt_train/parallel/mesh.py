"""The process groups of a layout, and the device mesh on which every parameter lies."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmt_train.config import ParallelConfig
from llmt_train.parallel.layout import Layout, Place, layout_of, place_of
from llmt_train.parallel.patience import as_patient_as_all


@dataclass(frozen=True)
class Axis:
    """Some ranks that do something together, as one of them sees it."""

    group: dist.ProcessGroup | None
    """``None`` where the axis has one rank: nothing is to be exchanged."""
    size: int
    rank: int
    """Of this process, inside the group."""


ALONE = Axis(None, 1, 0)


@dataclass(frozen=True)
class Mesh:
    """Where this process stands."""

    layout: Layout
    place: Place
    parameters: DeviceMesh | None
    """Axes ``replicate``, ``shard`` (with cp inside) and ``tp``; ``None`` where nothing is sharded."""
    tp: Axis
    cp: Axis
    dp: Axis
    """Ranks that read different rows and are alike otherwise."""
    averaged: Axis
    """Ranks over which gradients are averaged: dp x cp."""

    @property
    def fsdp(self) -> DeviceMesh:
        """What `fully_shard` is given."""
        assert self.parameters is not None  # `build_mesh` made one
        return self.parameters["replicate", "shard"] if self.layout.replicate > 1 else self.parameters["shard"]


def build_mesh(layout: Layout, device_type: str) -> Mesh:
    """Make the groups of a layout; all ranks call it, once, after the process group has begun."""
    rank = dist.get_rank()
    shape = (layout.replicate, layout.shard * layout.cp, layout.tp)
    parameters = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard", "tp"))
    for group in parameters.get_all_groups():
        as_patient_as_all(group)
    dp = _axis(layout, rank, ("replicate", "shard"))
    return Mesh(
        layout,
        place_of(layout, rank),
        parameters,
        tp=_axis(layout, rank, ("tp",)),
        cp=_axis(layout, rank, ("cp",)),
        dp=dp,
        averaged=dp if layout.cp == 1 else _axis(layout, rank, ("replicate", "shard", "cp")),
    )


def open_mesh(config: ParallelConfig) -> Mesh:
    """Take this process's place in the layout that the config asks for; all ranks call it.

    Raises:
        ConfigError: the processes that there are cannot be arranged so.
    """
    layout = layout_of(config, dist.get_world_size())
    return build_mesh(layout, "cuda" if torch.cuda.is_available() else "cpu")


def _axis(layout: Layout, rank: int, names: tuple[str, ...]) -> Axis:
    """Ranks that differ in the named axes alone. Every rank makes every group, as torch wants it."""
    found = ALONE
    if all(getattr(layout, name) == 1 for name in names):
        return found
    groups: dict[Place, list[int]] = {}
    for other in range(layout.world):
        place = place_of(layout, other)
        groups.setdefault(place._replace(**dict.fromkeys(names, 0)), []).append(other)
    for ranks in groups.values():
        group = dist.new_group(ranks)
        if rank in ranks:
            found = Axis(as_patient_as_all(group), len(ranks), ranks.index(rank))
    return found
