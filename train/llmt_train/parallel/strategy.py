"""Lightning's strategy for a model that is laid out over devices already: see `sharding` and `tensor`."""

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy

from llmt_train.parallel.mesh import Mesh


class LaidOut(ModelParallelStrategy):
    """Leaves parameters and processes as they are; Lightning would move the one and start the other."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh.layout.averaged, mesh.layout.tp)
        self._mesh = mesh

    def setup_environment(self) -> None:
        """Take the process group and the mesh that are there."""
        ParallelStrategy.setup_environment(self)
        self.set_world_ranks()
        self._device_mesh = self._mesh.parameters

    def model_to_device(self) -> None:
        """Do nothing: parameters may lie in the host's memory on purpose."""
