"""Chunk files: plain Zarr, hashed on the way to the disk, however they are handed over."""

import hashlib
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep import arrays

VALUES = np.random.default_rng(0).integers(0, 2**16, (700, 1000), np.uint16)  # 1.4 MB: more than one piece


def write_in_parts(path: Path, parts: list[np.ndarray], size: int) -> str:
    with arrays.writing_chunk(path, size) as writer:
        for part in parts:
            writer.add(part)
    return writer.sha256()


def test_a_chunk_is_the_raw_array_its_checksum_and_nothing_else(tmp_path: Path) -> None:
    sha256 = arrays.write_chunk(tmp_path / "chunk", VALUES)
    content = (tmp_path / "chunk").read_bytes()
    assert content[:-4] == VALUES.tobytes()
    assert content[-4:] == google_crc32c.value(VALUES.tobytes()).to_bytes(4, "little")
    assert sha256 == hashlib.sha256(content).hexdigest()


def test_a_chunk_in_parts_is_the_same_and_zeros_fill_it(tmp_path: Path) -> None:
    padded = np.zeros((1500, 1000), np.uint16)
    padded[:700] = VALUES
    whole = arrays.write_chunk(tmp_path / "whole", padded)
    parts = write_in_parts(tmp_path / "parts", [VALUES[:1], VALUES[1:690], VALUES[690:]], padded.nbytes)
    assert parts == whole
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_values_of_another_layout_are_written_in_c_order_and_little_endian(tmp_path: Path) -> None:
    foreign = np.asfortranarray(VALUES[:20]).astype(">u2")
    assert arrays.write_chunk(tmp_path / "a", foreign) == arrays.write_chunk(tmp_path / "b", VALUES[:20])


def test_a_chunk_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="20 bytes more"):
        write_in_parts(tmp_path / "chunk", [VALUES[0, :50], VALUES[0, :10]], 100)
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(0, 23), max_size=12))
def test_a_column_does_not_depend_on_its_parts(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    folder = tmp_path_factory.mktemp("column")
    values = np.arange(1, sum(lengths) + 1, dtype=np.uint32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "COLUMN_CHUNK", 10)
        writer = arrays.ColumnWriter(folder / "column", len(values), "uint32")
        for part in np.split(values, np.cumsum(lengths)):
            writer.add(part)
        writer.finish()
    stored = zarr.open(folder / "column", mode="r")
    np.testing.assert_array_equal(stored[:], values)
    files = [path for path in (folder / "column").rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert writer.sha256 == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@given(st.lists(st.integers(0, 9), max_size=9))
def test_columns_side_by_side_do_not_depend_on_their_parts(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("columns")
    values = np.arange(2 * sum(lengths), dtype=np.uint64).reshape(-1, 2) + 2**63
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "COLUMN_CHUNK", 7)
        writer = arrays.ColumnWriter(folder / "columns", len(values), "uint64", width=2)
        for part in np.split(values, np.cumsum(lengths)):
            writer.add(part)
        writer.finish()
    stored = zarr.open(folder / "columns", mode="r")
    assert stored.shape == (sum(lengths), 2)
    np.testing.assert_array_equal(stored[:], values)
    files = [path for path in (folder / "columns").rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert writer.sha256 == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_column_of_another_length_than_promised_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="3 elements, 4 promised"):
        arrays.write_column(tmp_path / "column", [np.arange(3)], 4, "int64")
