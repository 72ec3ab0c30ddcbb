"""Tensors on disk as torch's distributed checkpoints: written by every rank, read on any other layout.

Every rank writes the parts of tensors that it holds; of parts that several ranks hold, one of them. A folder has
torch's own ``.metadata``, which is a pickle and is there for torch's tools alone: we read index.json, which says the
same, and parts are loaded with ``weights_only=True``. So nothing that is read can run code.
"""

import json
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from llmt_shared.errors import FormatError
from llmt_train.parallel.together import agreed, divided, own_rank, told_first

INDEX = "index.json"
_FORMAT = 1


class Part(NamedTuple):
    """Some consecutive elements of a tensor in every dim, and where they lie on the disk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    """First byte."""
    length: int
    """Bytes."""


class Stored(BaseModel, frozen=True, extra="forbid"):
    """A tensor on disk."""

    dtype: str
    """As torch names it, without ``torch.``."""
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class Index(BaseModel, frozen=True, extra="forbid"):
    """index.json."""

    format: int
    tensors: dict[str, Stored]


def write(folder: Path, tensors: Mapping[str, Tensor]) -> list[Path]:
    """Write tensors; all ranks call it with the same names, and with their parts of DTensors.

    Args:
        folder: is there, empty, and the same for all ranks.
        tensors: by name; a plain tensor is taken to be the same on all ranks.

    Returns:
        The files that this rank wrote.

    Raises:
        OSError: a file of any rank cannot be written; raised on all.
    """
    return Writing(folder, tensors).finish()


class Writing:
    """Tensors on their way to the disk: who writes which part is settled; they can be copied to be written later."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Settle who writes what, all ranks together; nothing is written yet."""
        self._folder = folder
        self._planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._writer = FileSystemWriter(folder)
        self._metadata: Metadata | None = None
        plan: SavePlan = divided(agreed(lambda: self._own_plan(tensors)), self._divide)
        self._plan = self._planner.finish_plan(plan)

    def hold(self) -> None:
        """Copy what this rank writes to the host's memory: the tensors may then change."""
        agreed(lambda: self._planner.hold(self._plan))
        self._writer.per_thread_copy_ahead = 0  # a thread that only writes shall not touch the (first!) GPU

    def finish(self) -> list[Path]:
        """Write, all ranks together; return the files that this rank wrote."""
        results: list[WriteResult] = agreed(self._write)
        everyones = told_first(results)
        files = {self._folder / result.storage_data.relative_path for result in results}
        if everyones is not None:
            files |= {self._folder / INDEX, self._folder / ".metadata"}
        agreed(lambda: None if everyones is None else self._write_index(everyones))
        return sorted(files)

    def _own_plan(self, tensors: Mapping[str, Tensor]) -> SavePlan:
        first = own_rank() == 0
        self._planner.set_up_planner(dict(tensors), self._writer.storage_meta(), first)
        self._writer.set_up_storage_writer(first)
        return self._writer.prepare_local_plan(self._planner.create_local_plan())

    def _divide(self, plans: list[SavePlan]) -> list[SavePlan]:
        plans, self._metadata = self._planner.create_global_plan(plans)
        return self._writer.prepare_global_plan(plans)

    def _write(self) -> list[WriteResult]:
        try:
            return self._writer.write_data(self._plan, self._planner).value()
        except RuntimeError as error:  # torch hides why a file cannot be written
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    def _write_index(self, results: list[list[WriteResult]]) -> None:
        assert self._metadata is not None
        self._writer.finish(self._metadata, results)
        places = {result.index: result.storage_data for each in results for result in each}
        tensors = {
            name: _described(name, stored, places) for name, stored in self._metadata.state_dict_metadata.items()
        }
        index = {"format": _FORMAT, "tensors": tensors}
        with (self._folder / INDEX).open("w") as file:
            json.dump(index, file)


class _SavePlanner(DefaultSavePlanner):
    """Torch's own, which can keep copies of what this rank writes."""

    _held: dict[MetadataIndex, Tensor] | None = None

    def hold(self, plan: SavePlan) -> None:
        resolve: Callable[[WriteItem], Any] = super().resolve_data
        self._held = {item.index: resolve(item).detach().to("cpu", copy=True) for item in plan.items}
        self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> Any:
        return super().resolve_data(write_item) if self._held is None else self._held[write_item.index]


def _described(name: str, stored: Any, places: Mapping[MetadataIndex, Any]) -> dict[str, Any]:
    """An entry of index.json."""
    parts = []
    for chunk in stored.chunks:
        if math.prod(chunk.sizes):
            place = places[MetadataIndex(name, chunk.offsets)]
            parts.append([chunk.offsets, chunk.sizes, place.relative_path, place.offset, place.length])
    return {"dtype": str(stored.properties.dtype).removeprefix("torch."), "shape": stored.size, "parts": parts}


def read_index(folder: Path) -> Index:
    """Return what a folder of tensors holds.

    Raises:
        FormatError: its index.json is missing, damaged or of another format.
    """
    path = folder / INDEX
    try:
        index = Index.model_validate_json(path.read_bytes())
        for stored in index.tensors.values():
            _check(stored)
    except (OSError, ValidationError, ValueError) as error:
        raise FormatError(f"{path}: {str(error).splitlines()[0]}") from None
    if index.format != _FORMAT:
        raise FormatError(f"{path}: format {index.format}; this llmt reads {_FORMAT}")
    return index


def _check(stored: Stored) -> None:
    """Raise ValueError where an entry of an index makes no sense."""
    if not isinstance(getattr(torch, stored.dtype, None), torch.dtype):
        raise ValueError(f"no dtype {stored.dtype!r}")
    for part in stored.parts:
        ends = [offset + size for offset, size in zip(part.offsets, part.sizes, strict=True)]
        is_inside = all(end <= size for end, size in zip(ends, stored.shape, strict=True))
        if not is_inside or min((*part.offsets, *part.sizes, part.start, part.length), default=0) < 0:
            raise ValueError(f"a part at {part.offsets} of {part.sizes} in a tensor of {stored.shape}")
        if Path(part.file).name != part.file:
            raise ValueError(f"a part in another folder: {part.file!r}")
    if sum(math.prod(part.sizes) for part in stored.parts) != math.prod(stored.shape):
        raise ValueError(f"parts that are not the whole of a tensor of {stored.shape}")


def read(folder: Path, tensors: Mapping[str, Tensor], index: Index | None = None) -> None:
    """Fill tensors in place; every rank for itself, with any names and layout. Other dtypes are converted.

    Args:
        folder: of `write`.
        tensors: by name: plain ones are filled whole, of DTensors this rank's part.
        index: the folder's, where it has been read.

    Raises:
        FormatError: there is no such tensor, or it has another shape; a file is damaged or holds something else.
    """
    index = index or read_index(folder)
    for name, tensor in tensors.items():
        stored = index.tensors.get(name)
        if stored is None:
            raise FormatError(f"{folder}: holds no {name}")
        if stored.shape != tuple(tensor.shape):
            raise FormatError(f"{folder}: {name} is {list(stored.shape)}; wanted {list(tensor.shape)}")
    planner, reader = (
        DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        FileSystemReader(folder),
    )
    metadata = _metadata_of({name: index.tensors[name] for name in tensors})
    try:
        planner.set_up_planner(dict(tensors), metadata, True)
        reader.set_up_storage_reader(metadata, True)
        plan: LoadPlan = planner.create_local_plan()
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError:
        raise FormatError(f"{folder}: cannot be read: it holds something else than tensors") from None
    except (OSError, RuntimeError, ValueError, EOFError, AssertionError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FormatError(f"{folder}: cannot be read: {reason}") from None


class _Place(NamedTuple):
    """As torch's reader wants to be told where a part lies."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def _metadata_of(tensors: Mapping[str, Stored]) -> Metadata:
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _Place] = {}
    for name, stored in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)) for part in stored.parts]
        properties = TensorProperties(dtype=stored.torch_dtype)
        described[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
        for part in stored.parts:
            places[MetadataIndex(name, torch.Size(part.offsets))] = _Place(part.file, part.start, part.length)
    return Metadata(described, storage_data=places)
