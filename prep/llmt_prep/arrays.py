"""How arrays are written: plain Zarr v3, each chunk file the raw little-endian array and its CRC-32C.

Metadata is written here and not by the zarr package, so that a dataset's bytes do not change with that package's
version; `llmt-prep verify` and the tests read everything back through zarr.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from llmt_shared import durable
from llmt_shared.dataset import CODECS

COLUMN_CHUNK = 1_048_576
"""Elements in a chunk of a one-dimensional array."""


def write_group(path: Path, attributes: dict[str, Any]) -> None:
    """Make a directory a Zarr group."""
    _write_json(path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})


def write_metadata(path: Path, shape: tuple[int, ...], chunk_shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Write the zarr.json of one array."""
    meta = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": CODECS,
        "attributes": {},
    }
    _write_json(path / "zarr.json", meta)


def write_chunk(path: Path, chunk: NDArray[Any]) -> None:
    """Write one chunk file; a chunk of zeros too, for a missing file must mean a damaged dataset."""
    raw = np.ascontiguousarray(chunk.astype(chunk.dtype.newbyteorder("<"), copy=False)).reshape(-1).view(np.uint8)
    with durable.writing(path) as file:
        file.write(raw.data)
        file.write(google_crc32c.value(raw).to_bytes(4, "little"))


def write_column(path: Path, parts: Iterable[NDArray[Any]], length: int, dtype: str) -> None:
    """Write a one-dimensional array of ``length`` elements from parts, holding about one chunk in memory."""
    size = max(1, min(length, COLUMN_CHUNK))
    write_metadata(path, (length,), (size,), np.dtype(dtype))
    buffer = np.zeros(size, dtype)
    filled = chunk = written = 0
    for part in parts:
        start = 0
        while start < len(part):
            count = min(size - filled, len(part) - start)
            buffer[filled : filled + count] = part[start : start + count]
            filled, start, written = filled + count, start + count, written + count
            if filled == size:
                write_chunk(path / "c" / str(chunk), buffer)
                buffer[:] = 0  # the last chunk is padded to full size
                filled, chunk = 0, chunk + 1
    if filled:
        write_chunk(path / "c" / str(chunk), buffer)
    assert written == length, f"{path}: {written} elements written, {length} promised"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    durable.write(path, json.dumps(value, indent=1) + "\n")
