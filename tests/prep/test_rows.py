"""The plan of a split holds every segment of what was handed to it, with its place in the corpus."""

import tempfile
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_chats import Chat, Landed, chats, documents_of, landed, write_chats
from synthetic_corpus import of_lengths, sources_of, write_corpus

from llmt_prep import order, rows, tally
from llmt_prep.corpus import Corpus
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


OVERFLOWS = [(1, "drop"), (1, "truncate"), (2, "drop"), (2, "truncate_prompt")]


def plan_of_chats(
    folder: Path, found: list[Chat], capacity: int, overflow: str, times: int = 1
) -> tuple[RowPlan, Corpus]:
    corpus = write_chats(folder / "store", [found], 7)
    windows = in_windows([documents_of(corpus)] * times, 10)
    write_rows(folder / "rows", windows, corpus, capacity, overflow, 0.9)
    return load_rows(folder / "rows"), corpus


def segments_in(found: RowPlan, corpus: Corpus) -> list[list[tuple[int, int, list[int]]]]:
    """Document, offset and tokens of the segments of each row."""
    tokens = np.concatenate([corpus.open_unit(unit).tokens for unit in range(len(corpus.units))])
    columns = zip(found.document.tolist(), found.offset.tolist(), found.address, found.length, strict=True)
    segments = [(document, offset, tokens[at : at + n].tolist()) for document, offset, at, n in columns]
    return [segments[first:last] for first, last in pairwise(found.offsets.tolist())]


@settings(max_examples=15)
@pytest.mark.parametrize(("sides", "overflow"), OVERFLOWS)
@given(data=st.data(), capacity=st.integers(8, 40), times=st.integers(1, 2))
def test_the_sides_of_what_lands_are_neighbours_in_a_row_chosen_first(sides, overflow, data, capacity, times):
    found = data.draw(chats(sides))
    with tempfile.TemporaryDirectory() as folder:
        rows = segments_in(*plan_of_chats(Path(folder), found, capacity, overflow, times))
    items = [tuple(row[place : place + sides]) for row in rows for place in range(0, len(row), sides)]
    kept = [(number, landed(chat, capacity, overflow)) for number, chat in enumerate(found)]
    wanted = [_segments(number, parts) for number, parts in kept if parts]
    assert sorted(items) == sorted(wanted * times)
    assert all(len(row) and sum(len(tokens) for _, _, tokens in row) <= capacity for row in rows)


def _segments(document: int, parts: list[Landed]) -> tuple[tuple[int, int, list[int]], ...]:
    return tuple((document, part.offset, part.side.tokens) for part in parts)


@settings(max_examples=15)
@pytest.mark.parametrize(("sides", "overflow"), OVERFLOWS)
@given(data=st.data(), capacity=st.integers(8, 40), times=st.integers(1, 2))
def test_chats_that_are_cut_and_dropped_are_counted(sides, overflow, data, capacity, times):
    found = data.draw(chats(sides))
    with tempfile.TemporaryDirectory() as folder:
        rows, _ = plan_of_chats(Path(folder), found, capacity, overflow, times)
        (counted,) = rows.tallies
    whole = [sum(len(side.tokens) for side in chat) for chat in found]
    kept = [sum(len(part.side.tokens) for part in landed(chat, capacity, overflow)) for chat in found]
    lost = list(zip(whole, kept, strict=True))
    assert (counted.documents, counted.tokens) == (times * len(found), times * sum(whole))
    assert (counted.distinct_documents, counted.distinct_tokens) == (len(found), sum(whole))
    assert counted.truncated == times * sum(length - rest for length, rest in lost if rest)
    assert counted.dropped == times * sum(length for length, rest in lost if not rest)
    assert counted.dropped_documents == times * kept.count(0)
