"""Are the arrays what FORMAT.md says, and do their chunks read back through zarr itself as our reader reads them."""

import math
from collections.abc import Callable, Iterator
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import ObjectStore

from llmt_prep.verify.findings import Finding, attempt, finding
from llmt_shared.chunks import CRC_BYTES, ArrayFolder, ChunkedArray
from llmt_shared.manifest import Manifest
from llmt_shared.objects import Location, store_below

_SAMPLED_ROWS = 16  # of a chunk of tokens; the other arrays are compared in full


def wanted_arrays(manifest: Manifest, split: str) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of each array of a split."""
    sizes = manifest.splits[split]
    tokens = np.uint16 if manifest.tokenizer.max_id <= np.iinfo(np.uint16).max else np.uint32
    wanted: dict[str, tuple[tuple[int, ...], Any]] = {
        "tokens": ((sizes.rows, manifest.length), np.dtype(tokens)),
        "row_offsets": ((sizes.rows + 1,), np.dtype(np.int64)),
        "row_targets": ((sizes.rows,), np.dtype(np.uint32)),
        "segment_length": ((sizes.segments,), np.dtype(np.uint32)),
        "segment_offset": ((sizes.segments,), np.dtype(np.uint32)),
        "segment_document": ((sizes.segments,), np.dtype(np.uint64)),
        "segment_source": ((sizes.segments,), np.dtype(np.uint16)),
    }
    if manifest.kind != "pretrain":
        wanted["span_offsets"] = ((sizes.rows + 1,), np.int64)
        wanted |= dict.fromkeys(("span_start", "span_length"), ((sizes.spans,), np.uint32))
    if manifest.kind == "preference":
        wanted["pair_offsets"] = ((sizes.rows + 1,), np.int64)
        wanted["pair_segments"] = ((sizes.pairs, 2), np.uint64)
        wanted["row_chosen_targets"] = ((sizes.rows,), np.uint32)
    return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in wanted.items()}


def misdescribed_arrays(arrays: ArrayFolder, manifest: Manifest, split: str) -> Iterator[Finding]:
    """Compare shapes, dtypes and chunk files with what the manifest asks for; reads no chunk."""
    for name, (shape, dtype) in wanted_arrays(manifest, split).items():
        array, failed = attempt("F010", f"{split}/{name}/zarr.json", arrays.open, name)
        yield from failed
        if array is not None:
            wrong, failed = attempt(
                "F010", f"{split}/{name}/zarr.json", _wrong_description, array, shape, dtype, manifest, split
            )
            yield from failed
            yield from (finding("F010", f"{split}/{name}", message) for message in wrong or ())


def damaged_chunks(
    dataset: Location, arrays: ArrayFolder, manifest: Manifest, split: str, advance: Callable[[int], None]
) -> Iterator[Finding]:
    """Read every chunk through zarr, which checks its CRC-32C, and compare with our reader.

    Args:
        dataset: its folder or URL.
        arrays: those of the split, as our reader finds them.
        manifest: its manifest.
        split: whose arrays are well described.
        advance: told the chunks done.
    """
    group, failed = attempt("F010", f"{split}/zarr.json", open_group, dataset / split)
    yield from failed
    for name in wanted_arrays(manifest, split) if group is not None else ():
        ours = arrays.open(name)
        theirs, failed = attempt("F010", f"{split}/{name}/zarr.json", getitem, group, name)
        yield from failed
        step = ours.chunk_shape[0]
        for chunk, start in enumerate(() if theirs is None else range(0, len(ours), step)):
            place = f"{split}/{name}/c/{chunk}" + "/0" * (len(ours.shape) - 1)
            is_same, failed = attempt("F011", place, _is_same, ours, theirs, start, min(start + step, len(ours)))
            yield from failed
            if is_same is False:
                yield finding("F012", place, "zarr reads other numbers than our reader")
            advance(1)


def open_group(group: Location) -> zarr.Group:
    """Open a group as any reader of Zarr v3 does."""
    where = group if isinstance(group, Path) else ObjectStore(store_below(group), read_only=True)
    return zarr.open_group(where, mode="r", zarr_format=3)


def num_chunks(manifest: Manifest, split: str) -> int:
    """Chunk files of a split's arrays."""
    return sum(1 for entry in manifest.files if entry.path.startswith(f"{split}/") and "/c/" in entry.path)


def _wrong_description(
    array: ChunkedArray, shape: tuple[int, ...], dtype: np.dtype[Any], manifest: Manifest, split: str
) -> list[str]:
    if array.shape != shape or array.dtype != dtype.newbyteorder("<"):
        return [f"is {array.dtype.name} {list(array.shape)}; wanted {dtype.name} {list(shape)}"]
    if len(array.chunk_shape) != len(shape) or min(array.chunk_shape) < 1 or array.chunk_shape[1:] != shape[1:]:
        return [f"chunks are {list(array.chunk_shape)}; wanted whole rows of {list(shape)}"]
    return _wrong_chunks(array, manifest, f"{split}/{array.path.name}/c/")


def _wrong_chunks(array: ChunkedArray, manifest: Manifest, prefix: str) -> list[str]:
    """Chunk files that the manifest lacks, has too many of, or gives another size than chunks of this shape have."""
    listed = {entry.path: entry.bytes for entry in manifest.files if entry.path.startswith(prefix)}
    wanted = -(-len(array) // array.chunk_shape[0])
    if len(listed) != wanted:
        return [f"the manifest lists {len(listed)} chunk files; wanted {wanted}"]
    size = math.prod(array.chunk_shape) * array.dtype.itemsize + CRC_BYTES
    names = [prefix + str(chunk) + "/0" * (len(array.shape) - 1) for chunk in range(wanted)]
    return [
        f"{name}: {listed.get(name, 'no such file; wanted')} bytes; wanted {size}"
        for name in names
        if listed.get(name) != size
    ]


def _is_same(ours: ChunkedArray, theirs: Any, start: int, stop: int) -> bool:
    chunk: NDArray[Any] = theirs[start:stop]
    if ours.path.name != "tokens":
        return np.array_equal(chunk, ours[start:stop])
    rows = np.unique(np.linspace(0, len(chunk) - 1, _SAMPLED_ROWS).astype(np.int64))
    return np.array_equal(chunk[rows], ours.take(start + rows))
