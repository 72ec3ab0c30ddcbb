"""Lightning's strategy for a model that is laid out over devices already: see `sharding` and `tensor`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy

from llmt_train import checkpoints
from llmt_train.parallel.mesh import Mesh


class LaidOut(ModelParallelStrategy):
    """Leaves parameters and processes as they are, where Lightning would move the one and start the other.

    What a checkpoint holds of model and optimizers, and how it is written, is `checkpoints`'s.
    """

    def __init__(self, mesh: Mesh, *, saves_trained_alone: bool) -> None:
        """Keep what Lightning will ask for.

        Args:
            mesh: of this process.
            saves_trained_alone: whether checkpoints leave out what does not train.
        """
        super().__init__(mesh.layout.averaged, mesh.layout.tp)
        self._mesh = mesh
        self._saves_trained_alone = saves_trained_alone

    def setup_environment(self) -> None:
        """Take the process group and the mesh that are there."""
        ParallelStrategy.setup_environment(self)
        self.set_world_ranks()
        self._device_mesh = self._mesh.parameters

    def model_to_device(self) -> None:
        """Do nothing: parameters may lie in the host's memory on purpose."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: see `checkpoints.take`."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Nothing: see `checkpoints.take`."""
        del optimizer
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Hand over what is to be written."""
        del filepath
        alone = self._saves_trained_alone
        storage_options(checkpoints.take(checkpoint, self._policy, self.optimizers, trained_alone=alone))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill model and optimizers; return the rest."""
        del weights_only
        folder, alone = Path(checkpoint_path), self._saves_trained_alone
        return checkpoints.load_training(folder, self._policy, self.optimizers, trained_alone=alone)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Do nothing: it is loaded."""

    @property
    def _policy(self) -> torch.nn.Module:
        model = self.lightning_module.model  # type: ignore[union-attr]
        assert isinstance(model, torch.nn.Module)
        return model


def snapshot(trainer: pl.Trainer) -> checkpoints.Snapshot:
    """Return what Lightning would write of a trainer with this strategy."""
    taken: list[checkpoints.Snapshot] = []
    trainer.save_checkpoint(trainer.default_root_dir, weights_only=False, storage_options=taken.append)
    return taken[0]
