"""What Lightning asks about the processes, answered from the process group that is there."""

import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


class JoinedGroup(ClusterEnvironment):
    """The group that `process.joined` began.

    To Lightning every process looks like a machine of its own with one device: `Trainer(devices=[index] or 1,
    num_nodes=world)`. So it takes the device it is given, whatever a scheduler lets this process see of the others.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """They are there."""
        return True

    @property
    def main_address(self) -> str:
        """Nobody is to connect any more."""
        return "localhost"

    @property
    def main_port(self) -> int:
        """Nobody is to connect any more."""
        return 0

    @staticmethod
    def detect() -> bool:
        """Lightning is told, and need not look."""
        return False

    def world_size(self) -> int:
        """All processes."""
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        """The group knows."""

    def global_rank(self) -> int:
        """Of this process among all."""
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        """The group knows."""

    def local_rank(self) -> int:
        """The index of its device among those that Lightning was given: one."""
        return 0

    def node_rank(self) -> int:
        """The process is its own machine."""
        return dist.get_rank()
