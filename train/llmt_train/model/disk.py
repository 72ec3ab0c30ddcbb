"""How a trained model lies in Hugging Face's files: under which names, cut or joined how, in which files.

A model in training has tensors of its own: fused layers are split (see `fused`), and transformers calls some tensors
otherwise in memory than in files (gpt_neox), or keeps several of them as one (experts). Each tensor of transformers'
model is made of some of ours and becomes some in files, so that one after the other can be written.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from llmt_shared.errors import FormatError
from llmt_train.model.fused import disk_names

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""As safetensors names them."""


class Piece(NamedTuple):
    """A tensor of transformers' model."""

    name: str
    empty: Tensor
    """On the meta device: its shape and dtype."""
    parts: tuple[str, ...]
    """Of which of ours it is made, one below the other."""
    files: dict[str, Tensor]
    """What it becomes in files, by name, on the meta device."""


def pieces_of(model: Any, found: Mapping[str, Sequence[int]], dtype: torch.dtype) -> list[Piece] | None:
    """Return what the tensors of a model in training become in files.

    Args:
        model: transformers', on the meta device, its layers not split.
        found: shapes of our tensors, by name.
        dtype: that parameters shall have in files.

    Returns:
        ``None`` where a tensor in files is made of several of the model's.

    Raises:
        FormatError: ours are not those of the model.
    """
    empty = _saved(model, dtype)
    parts = disk_names(model.config, found)
    wanted = {name: tuple(tensor.shape) for name, tensor in empty.items()}
    shapes = {name: _joined([found[part] for part in group]) for name, group in parts.items()}
    odd = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    if odd:
        raise FormatError(
            f"the weights do not fit config.json: {odd[0]} is {shapes.get(odd[0])}; wanted {wanted.get(odd[0])}"
        )
    pieces = [Piece(name, tensor, tuple(parts[name]), on_disk(model, name, tensor)) for name, tensor in empty.items()]
    alone = {key: tensor.shape for piece in pieces for key, tensor in piece.files.items()}
    together = {key: tensor.shape for key, tensor in revert_weight_conversion(model, empty).items()}
    return pieces if alone == together else None


def on_disk(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return what one tensor of a model is in files, by name."""
    return dict(revert_weight_conversion(model, {name: tensor}))


def _joined(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Of tensors one below the other."""
    if len(shapes) == 1:
        return tuple(shapes[0])
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def _saved(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """What of a model is saved, tied tensors once."""
    persistent = model.state_dict().keys()
    empty = {name: torch.empty_like(parameter, dtype=dtype) for name, parameter in model.named_parameters()}
    empty |= {name: torch.empty_like(buffer) for name, buffer in model.named_buffers() if name in persistent}
    ignored = model._keys_to_ignore_on_save or ()
    return {name: tensor.detach() for name, tensor in empty.items() if name not in ignored}


def write_files(
    directory: Path, pieces: Iterable[Piece], read: Callable[[Piece], Mapping[str, Tensor]], max_shard: int
) -> None:
    """Write model.safetensors, or several files and their index; only one piece is in memory at a time.

    Args:
        directory: is there.
        pieces: what to write.
        read: returns a piece's tensors as they are in files.
        max_shard: bytes of a file; a larger tensor has one of its own.

    Raises:
        OSError: a file cannot be written.
    """
    ordered = sorted(pieces, key=lambda piece: -piece.empty.dtype.itemsize)  # so that every tensor is aligned
    shards = list(_shards(ordered, max_shard))
    weight_map: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, 1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = several if len(shards) > 1 else "model.safetensors"
        size += _write_file(directory / name, shard, read)
        weight_map |= {key: name for _, keys in shard for key in keys}
    if len(shards) > 1:
        total = sum(piece.empty.numel() for piece in ordered)
        index = {"metadata": {"total_parameters": total, "total_size": size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (directory / "model.safetensors.index.json").write_text(text + "\n")


Shard = list[tuple[Piece, list[str]]]
"""Pieces and which of their tensors are in a file."""


def _shards(pieces: Iterable[Piece], max_shard: int) -> Iterator[Shard]:
    shard: Shard = []
    size = 0
    for piece in pieces:
        for key, tensor in piece.files.items():
            if shard and size + tensor.nbytes > max_shard:
                yield shard
                shard, size = [], 0
            if not shard or shard[-1][0] is not piece:
                shard.append((piece, []))
            shard[-1][1].append(key)
            size += tensor.nbytes
    if shard:
        yield shard


def _write_file(path: Path, shard: Shard, read: Callable[[Piece], Mapping[str, Tensor]]) -> int:
    """Write one file; return the bytes of its tensors. Format: https://huggingface.co/docs/safetensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    for piece, keys in shard:
        for key in keys:
            tensor = piece.files[key]
            place = [size, size + tensor.nbytes]
            header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
            size = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece, keys in shard:
            _write_tensors(file, piece, keys, read(piece))  # a call, so that they are gone before the next are read
    return size


def _write_tensors(file: BinaryIO, piece: Piece, keys: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    for key in keys:
        assert tensors[key].shape == piece.files[key].shape
        assert tensors[key].dtype == piece.files[key].dtype
        file.write(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
