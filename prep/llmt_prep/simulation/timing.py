"""How long a stage takes on so many machines, and what holds it up: arithmetic on measured rates."""

from dataclasses import dataclass

from llmt_shared.config import StrictModel


class Cluster(StrictModel):
    """What the simulated run has."""

    machines: int = 1
    cores: int = 1
    """Of each machine, each with one worker."""
    disk: float | None = None
    """Bytes a second of each machine, read and written together; ``None`` sets no limit."""
    network: float | None = None
    """The same, over the network."""

    @property
    def workers(self) -> int:
        """Of all machines."""
        return self.machines * self.cores


@dataclass(frozen=True)
class Work:
    """What a stage has to do."""

    name: str
    alone: float = 0.0
    """Seconds that the coordinator works before or after the others do."""
    shared: float = 0.0
    """Seconds of one core, to be shared out."""
    longest: float = 0.0
    """Seconds of the longest task, which cannot be."""
    moved: float = 0.0
    """Bytes that are read and written."""
    startup: float = 0.0
    """Seconds until workers work, where others than the coordinator do."""
    startup_alone: float = 0.0
    """The same where it does all by itself."""
    is_shared: bool = True
    """Whether workers of all machines take part; else the coordinator does everything."""


class Stage(StrictModel):
    """One stage of the simulated run."""

    name: str
    seconds: float
    startup: float
    """Of them, until workers work."""
    bound_by: str
    """What the most of the time is spent on."""
    moved: int
    """Bytes read and written."""


def time_of(work: Work, cluster: Cluster) -> Stage:
    """Return how long a stage takes: its slowest resource decides, for they work at the same time."""
    machines, workers = (cluster.machines, cluster.workers) if work.is_shared else (1, 1)
    limits = {"cores" if workers > 1 else "one core": work.shared / workers, "longest task": work.longest}
    for name, rate in (("disk", cluster.disk), ("network", cluster.network)):
        if rate is not None:
            limits[name] = work.moved / (rate * machines)
    startup = work.startup if workers > 1 else work.startup_alone
    slowest = max(limits, key=lambda name: limits[name])
    parts = {slowest: limits[slowest], "coordinator": work.alone, "start-up": startup}
    return Stage(
        name=work.name,
        seconds=sum(parts.values()),
        startup=startup,
        bound_by=max(parts, key=lambda name: parts[name]),
        moved=round(work.moved),
    )
