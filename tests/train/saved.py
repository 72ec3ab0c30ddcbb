"""What a checkpoint holds."""

from pathlib import Path

import torch

from llmt_train.checkpoints.sharded import read_index, read_whole


def saved_tensors(checkpoint: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors whose name begins with a prefix, by the rest of it."""
    folder = checkpoint / "tensors"
    index = read_index(folder)
    names = [name for name in index.tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): read_whole(folder, name, index) for name in names}
