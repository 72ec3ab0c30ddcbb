"""The plan of a split holds every segment of what was handed to it, with its place in the corpus."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from synthetic_corpus import of_lengths, sources_of, write_corpus

from llmt_prep import order, rows, tally
from llmt_prep.mixture import plan
from llmt_prep.order import Documents, Shuffling
from llmt_prep.rows import RowPlan, is_planned, load_rows, write_rows
from llmt_prep.survey import LIGHTEST
from llmt_prep.windows import in_windows, windows
from llmt_shared.errors import DataError

LENGTHS = [np.random.default_rng(7).integers(1, 150, 90).tolist(), [9, 300, 41]]
CAPACITY = 100
FILES = ["address.bin", "document.bin", "length.bin", "offset.bin", "offsets.bin", "plan.json"]


def all_documents() -> Documents:
    lengths = np.concatenate(LENGTHS)
    return of_lengths(lengths)


def planned(folder: Path, overflow: str = "split", times: int = 1) -> RowPlan:
    corpus = write_corpus(folder / "store", LENGTHS, 20)
    write_rows(folder / "rows", in_windows([all_documents()] * times, 25), corpus, CAPACITY, overflow, 0.9)
    return load_rows(folder / "rows")


@pytest.mark.parametrize("overflow", ["split", "truncate", "drop"])
def test_rows_hold_every_landing_token_once(tmp_path: Path, overflow: str) -> None:
    found = planned(tmp_path, overflow)
    lengths = np.concatenate(LENGTHS)
    kept = {"split": lengths, "truncate": np.minimum(lengths, 100), "drop": np.where(lengths > 100, 0, lengths)}
    tokens = [
        (document, offset + i)
        for document, offset, length in zip(found.document, found.offset, found.length, strict=True)
        for i in range(length)
    ]
    assert sorted(tokens) == [(d, i) for d, length in enumerate(kept[overflow]) for i in range(length)]
    starts = np.cumsum(lengths) - lengths
    assert found.address.tolist() == (starts[found.document] + found.offset).tolist()


def test_no_row_overflows_and_rows_cover_all_segments(tmp_path: Path) -> None:
    found = planned(tmp_path)
    assert (found.offsets[0], found.offsets[-1]) == (0, len(found.length))
    assert np.add.reduceat(found.length, found.offsets[:-1]).max() <= CAPACITY
    assert (np.diff(found.offsets) > 0).all()
    assert found.num_rows == len(found.offsets) - 1


def test_nothing_but_the_plan_stays_in_its_folder(tmp_path: Path) -> None:
    planned(tmp_path)
    assert is_planned(tmp_path / "rows")
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == FILES


def test_a_plan_that_was_killed_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill leaves, here all of it, does not change the plan."""
    wanted = planned(tmp_path / "whole", times=2)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(DataError, match="more than the 100 of a row"):
        planned(tmp_path / "killed", "error")
    monkeypatch.undo()
    assert not is_planned(tmp_path / "killed" / "rows")
    assert (tmp_path / "killed" / "rows" / "seen").exists()
    corpus = write_corpus(tmp_path / "again", LENGTHS, 31)
    write_rows(tmp_path / "killed" / "rows", in_windows([all_documents()] * 2, 25), corpus, CAPACITY, "split", 0.9)
    assert load_rows(tmp_path / "killed" / "rows").tallies == wanted.tallies
    for name in FILES:
        assert (tmp_path / "killed/rows" / name).read_bytes() == (tmp_path / "whole/rows" / name).read_bytes()


def test_a_split_without_a_row_is_a_plan_of_none(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "store", [[500, 600]], 20)
    documents = of_lengths(np.array([500, 600]))
    write_rows(tmp_path / "rows", iter([documents]), corpus, CAPACITY, "drop", 0.9)
    found = load_rows(tmp_path / "rows")
    assert (found.num_rows, len(found.document)) == (0, 0)
    assert (found.tallies[0].dropped_documents, found.tallies[0].dropped) == (2, 1100)


def test_memory_does_not_grow_with_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times the documents; a single column of them would more than triple it."""
    monkeypatch.setattr(order, "PIECE", 64)
    monkeypatch.setattr(tally, "_PIECE", 64)
    _, few, many = (_peak(tmp_path / str(count), count) for count in (1000, 2000, 40_000))  # the first compiles
    assert many < 1.5 * few


def _peak(folder: Path, documents: int) -> int:
    """Bytes of arrays and objects at once, while two sources are planned and written."""
    lengths = np.random.default_rng(1).integers(1, 150, documents).tolist()
    parts = {"a": (lengths, {"epochs": 1.5}), "b": (lengths, {})}
    corpus = write_corpus(folder / "store", [lengths, lengths], documents // 4)
    shuffling = Shuffling(42, block_tokens=64 * LIGHTEST, group_tokens=256 * LIGHTEST)
    _, sources = sources_of(parts, shuffling)
    tracemalloc.start()
    try:
        stream = windows(sources, plan(sources, None), 512)
        rows.write_rows(folder / "rows", stream, corpus, CAPACITY, "split", 0.9)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
