"""What a checkpoint holds."""

from pathlib import Path

import torch

from llmt_shared.errors import FormatError
from llmt_train.checkpoints.sharded import Index, read, read_index


def saved_tensors(checkpoint: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors whose name begins with a prefix, by the rest of it."""
    folder = checkpoint / "tensors"
    index = read_index(folder)
    names = [name for name in index.tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): read_whole(folder, name, index) for name in names}


def read_whole(folder: Path, name: str, index: Index | None = None) -> torch.Tensor:
    """Return a whole tensor, on the CPU, or raise as `read`."""
    index = index or read_index(folder)
    if name not in index.tensors:
        raise FormatError(f"{folder}: holds no {name}")
    tensor = torch.empty(index.tensors[name].shape, dtype=index.tensors[name].torch_dtype)
    read(folder, {name: tensor}, index)
    return tensor
