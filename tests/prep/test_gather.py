"""Rows hold the tokens of their segments, compared with plain slices, whichever loop copies them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_corpus import make_corpus

import llmt_prep
import llmt_shared
from llmt_prep import gather
from llmt_prep.gather import Segments
from llmt_prep.kernels import gather as compiled
from llmt_prep.kernels import gather_numpy

KERNELS = pytest.mark.parametrize("kernels", [compiled, gather_numpy])


@st.composite
def cases(draw):
    """A corpus, and rows of pieces of its documents, with repeats and unused documents."""
    unit_lengths = draw(st.lists(st.lists(st.integers(1, 30), max_size=8), min_size=1, max_size=5))
    documents = [(u, d, n) for u, lengths in enumerate(unit_lengths) for d, n in enumerate(lengths)]
    capacity = draw(st.integers(1, 40))
    rows = []
    for _ in range(draw(st.integers(1, 6)) if documents else 0):
        row, free = [], capacity
        for unit, document, length in draw(st.lists(st.sampled_from(documents), min_size=1, max_size=6)):
            offset = draw(st.integers(0, length - 1))
            count = min(free, draw(st.integers(1, length - offset)))
            if count:
                row.append((unit, document, offset, count))
                free -= count
        rows.append(row)
    return unit_lengths, capacity, rows


def as_segments(unit_lengths: list[list[int]], rows: list[list[tuple[int, int, int, int]]]) -> Segments:
    starts = np.cumsum([0, *(n for lengths in unit_lengths for n in lengths)])
    first = np.cumsum([0, *map(len, unit_lengths)])
    flat = [(first[unit] + document, offset, count) for row in rows for unit, document, offset, count in row]
    document, offset, length = (np.array(column, np.int64) for column in zip(*flat, strict=True))
    per_row = np.array([len(row) for row in rows], np.int64)
    return Segments(per_row, length.astype(np.uint32), offset.astype(np.uint32), document, starts[document] + offset)


def naive(unit_lengths: list[list[int]], capacity: int, rows: list[list[tuple[int, int, int, int]]]) -> list[list[int]]:
    number = iter(range(1, 10**6))
    texts = [[[next(number) for _ in range(n)] for n in lengths] for lengths in unit_lengths]
    filled = [[t for u, d, offset, count in row for t in texts[u][d][offset : offset + count]] for row in rows]
    return [row + [0] * (capacity - len(row)) for row in filled]


@KERNELS
@pytest.mark.parametrize("window", [1, 20, gather.WINDOW])
@given(case=cases())
def test_rows_are_the_slices_of_their_documents(case, kernels: ModuleType, window: int) -> None:
    unit_lengths, capacity, rows = case
    if not rows:
        return
    out = np.full((len(rows), capacity), 65_535, np.uint16)  # what was there before must be gone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "WINDOW", window)
        origin = gather.gather(out, as_segments(unit_lengths, rows), make_corpus(unit_lengths), kernels)
    assert out.tolist() == naive(unit_lengths, capacity, rows)
    pieces = [piece for row in rows for piece in row]
    assert origin.document.tolist() == [1000 * unit + 7 + 3 * document for unit, document, _, _ in pieces]
    assert origin.source.tolist() == [unit % 3 for unit, _, _, _ in pieces]


@KERNELS
def test_ids_of_four_bytes_are_copied_as_they_are(kernels: ModuleType) -> None:
    corpus, out = make_corpus([[70_000, 5]], np.uint32), np.empty((1, 8), np.uint32)
    segments = as_segments([[70_000, 5]], [[(0, 0, 69_998, 2), (0, 1, 0, 5)]])
    gather.gather(out, segments, corpus, kernels)
    assert out.tolist() == [[69_999, 70_000, 70_001, 70_002, 70_003, 70_004, 70_005, 0]]


def test_numba_is_loaded_only_where_it_pays() -> None:
    assert gather.kernels_for(1000) is gather_numpy
    assert gather.kernels_for(10**6) is compiled


def test_without_numba_the_plain_loop_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("llmt_prep.kernels.gather")
    monkeypatch.setitem(sys.modules, "llmt_prep.kernels.gather", None)  # as if it could not be imported
    assert gather.kernels_for(10**6) is gather_numpy


def test_kernels_compile_where_no_folder_can_be_written(tmp_path: Path) -> None:
    for package in (llmt_prep, llmt_shared):
        source = Path(package.__path__[0])
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "llmt_prep" / "kernels" / "__pycache__").write_text("a file: no folder, not even for root")
    (tmp_path / "cache").write_text("a file, too")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    environment |= {
        "PYTHONPATH": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HOME": str(tmp_path / "cache"),
    }
    code = (
        "import numpy as np; from llmt_prep.kernels import gather; rows = np.ones((1, 3), np.uint16);"
        "gather.clear_tails(rows, np.array([1])); assert rows.tolist() == [[1, 0, 0]]; print(gather.__file__)"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(str(tmp_path))
