"""The process groups of a layout, and the device mesh on which every parameter lies."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmt_train.parallel.layout import Layout, Place, place_of, rank_of


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
    return Mesh(
        layout,
        place_of(layout, rank),
        parameters,
        tp=_axis(layout, rank, ("tp",)),
        cp=_axis(layout, rank, ("cp",)),
        dp=_axis(layout, rank, ("replicate", "shard")),
        averaged=_axis(layout, rank, ("replicate", "shard", "cp")),
    )


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
            found = Axis(group, len(ranks), ranks.index(rank))
    return found


def lead(layout: Layout, place: Place) -> int:
    """Return the rank that stands for those which share this one's rows."""
    return rank_of(layout, place._replace(cp=0, tp=0))


def is_first() -> bool:
    """Return whether this process is the one that writes and speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def device_of(local_rank: int) -> torch.device:
    """Return the device of a process: its GPU, or the CPU where there is none."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
