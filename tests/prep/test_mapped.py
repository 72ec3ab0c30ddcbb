"""Mapped files: what was read is let go."""

import re
from pathlib import Path

import numpy as np
import pytest

from llmt_prep import mapped

SMAPS = Path("/proc/self/smaps")


@pytest.fixture
def array(tmp_path: Path) -> np.memmap:
    np.arange(1_000_000, dtype=np.int64).tofile(tmp_path / "array.bin")
    return np.memmap(tmp_path / "array.bin", np.int64, mode="r")


def resident_kb(name: str) -> int:
    maps = re.findall(rf"{name}\n.*?\nRss: +(\d+) kB", SMAPS.read_text(), re.DOTALL)
    assert maps
    return sum(map(int, maps))


def test_take_is_indexing(array: np.memmap) -> None:
    index = np.random.default_rng(0).integers(0, len(array), 5000)
    np.testing.assert_array_equal(mapped.take(array, index), array[index])


def test_take_of_a_plain_array_is_indexing() -> None:
    values = np.arange(10)
    assert mapped.take(values, np.array([3, 3, 9, 0])).tolist() == [3, 3, 9, 0]
    assert mapped.take(values, np.empty(0, np.int64)).tolist() == []


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_released_pages_are_not_resident_and_read_again_as_they_were(array: np.memmap) -> None:
    total = int(array.sum())
    assert resident_kb("array.bin") == 8 * len(array) // 1024 // 4 * 4 + 4
    mapped.release(array[5:10].view(np.ndarray))  # any view of it
    assert resident_kb("array.bin") == 0
    assert int(array.sum()) == total


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_take_leaves_nothing_resident(array: np.memmap) -> None:
    mapped.take(array, np.arange(0, len(array), 7))
    assert resident_kb("array.bin") == 0


def test_what_was_changed_in_memory_alone_is_never_let_go(array: np.memmap) -> None:
    private = np.memmap(array.filename, np.int64, mode="c")
    private[3] = -1
    mapped.release(private)
    assert private[3] == -1
