"""How the processes of a run are arranged: replicate x shard x cp x tp, tp innermost.

A process is one rank. Ranks that differ in tp share layers, in cp rows, in shard parameters; copies of the
parameters differ in replicate. dp is replicate x shard: ranks that differ in it read different rows.
"""

from typing import NamedTuple

from llmt_shared.errors import ConfigError
from llmt_train.config import ParallelConfig


class Layout(NamedTuple):
    """Sizes of the axes."""

    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def dp(self) -> int:
        """Ranks that read different rows."""
        return self.replicate * self.shard

    @property
    def averaged(self) -> int:
        """Ranks over which gradients are averaged: all but those that share layers."""
        return self.dp * self.cp

    @property
    def world(self) -> int:
        """All ranks."""
        return self.averaged * self.tp


ONE_RANK = Layout()


class Place(NamedTuple):
    """Where one rank is: its index along every axis."""

    replicate: int
    shard: int
    cp: int
    tp: int


def layout_of(config: ParallelConfig, world: int) -> Layout:
    """Arrange ``world`` processes.

    Raises:
        ConfigError: they cannot be arranged so.
    """
    inner = config.cp * config.tp
    dp = world // inner if config.dp == "auto" else config.dp
    if dp * inner != world:
        said = f"dp {config.dp} x cp {config.cp} x tp {config.tp}"
        raise ConfigError(
            f"parallel: {said} cannot be {world} process{'es' if world > 1 else ''}; wanted "
            + (f"a multiple of {inner}" if config.dp == "auto" else f"{dp * inner} processes, or `dp: auto`")
        )
    if dp % config.replicate:
        raise ConfigError(f"parallel.replicate: {config.replicate} does not divide dp, which is {dp} here")
    return Layout(config.replicate, dp // config.replicate, config.cp, config.tp)


def place_of(layout: Layout, rank: int) -> Place:
    """Return where a rank is."""
    rest, tp = divmod(rank, layout.tp)
    rest, cp = divmod(rest, layout.cp)
    replicate, shard = divmod(rest, layout.shard)
    return Place(replicate, shard, cp, tp)


def rank_of(layout: Layout, place: Place) -> int:
    """Return which rank is at a place."""
    return ((place.replicate * layout.shard + place.shard) * layout.cp + place.cp) * layout.tp + place.tp
