"""verify finds what is wrong with spans and pairs though every checksum fits, and nothing in sound chats and pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from small_datasets import build_chats, copy, reseal, rewrite

from llmt_prep.verify import find_problems

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: build_chats(tmp_path_factory.mktemp(kind), kind) for kind in ("sft", "preference")}


@pytest.fixture
def chats(sound: dict[str, Path], tmp_path: Path) -> Path:
    return copy(sound["sft"], tmp_path / "data")


@pytest.fixture
def pairs(sound: dict[str, Path], tmp_path: Path) -> Path:
    return copy(sound["preference"], tmp_path / "data")


def codes(path: Path) -> list[str]:
    return [each.code for each in find_problems(path)]


def arrays_of(dataset: Path) -> Arrays:
    """Arrays of train, and besides, for each span, its row and the borders of its segment in that row."""
    found = {name: array[:] for name, array in zarr.open_group(dataset, mode="r")["train"].arrays()}
    lengths, per_row = found["segment_length"].astype(np.int64), np.diff(found["row_offsets"])
    starts = np.cumsum(lengths) - lengths
    starts -= np.repeat(starts[found["row_offsets"][:-1]], per_row)
    row = np.repeat(np.arange(len(per_row)), np.diff(found["span_offsets"]))
    segment = [
        first + int(np.searchsorted(starts[first:last], start, "right")) - 1
        for first, last, start in zip(
            found["row_offsets"][row], found["row_offsets"][row + 1], found["span_start"], strict=True
        )
    ]
    return found | {"row": row, "segment": np.array(segment), "begin": starts[segment], "length": lengths[segment]}


def set_item(place: Any, value: int) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[place] = value

    return change


def less(place: Any, value: int) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[place] -= value

    return change


@pytest.mark.parametrize("kind", ["sft", "preference"])
@pytest.mark.parametrize("overflow", ["drop", "cut"])
def test_sound_chats_and_pairs_have_no_findings(tmp_path, kind, overflow):
    cutting = {"sft": "truncate", "preference": "truncate_prompt"}[kind]
    length = {"sft": 64, "preference": 96}[kind]
    sequence = {"length": length, "overflow": cutting if overflow == "cut" else "drop"}
    dataset = build_chats(tmp_path, kind, sequence=sequence)
    assert find_problems(dataset) == []
    books = json.loads((dataset / "ledger.json").read_text())["sources"]["one"]["train"]
    assert (books["truncated"] if overflow == "cut" else books["dropped"]["tokens"]) > 0


def test_spans_of_the_whole_text_have_no_findings(tmp_path):
    chat = json.loads((build_chats(tmp_path / "one", "sft") / "mix.json").read_text())["chat"]
    assert find_problems(build_chats(tmp_path / "all", "sft", chat=chat | {"train_on": "all"})) == []


def test_blocks_of_one_row_find_the_same(sound, monkeypatch):
    monkeypatch.setattr("llmt_prep.verify.rows.TOKENS_AT_ONCE", 1)
    monkeypatch.setattr("llmt_prep.verify.spans._ROWS_AT_ONCE", 3)
    assert [find_problems(path) for path in sound.values()] == [[], []]


def in_padding(found: Arrays) -> tuple[int, int]:
    real = np.add.reduceat(found["segment_length"], found["row_offsets"][:-1])[found["row"]]
    span = int(np.flatnonzero(real + found["span_length"] <= found["tokens"].shape[1])[0])
    return span, int(real[span])


def over_a_border(found: Arrays) -> tuple[int, int]:
    span = int(np.flatnonzero(found["span_length"] > 1)[0])
    return span, int(found["begin"][span] + found["length"][span] - 1)


def before_the_row_before(found: Arrays) -> tuple[int, int]:
    return len(found["row"]) - 1, 2**32 - 1


def on_a_first_token(found: Arrays) -> tuple[int, int]:
    span = int(np.flatnonzero(found["segment"][1:] != found["segment"][:-1])[0]) + 1
    return span, int(found["begin"][span])


def on_the_span_before(found: Arrays) -> tuple[int, int]:
    span = int(np.flatnonzero(found["segment"][1:] == found["segment"][:-1])[0]) + 1
    return span, int(found["span_start"][span - 1] + found["span_length"][span - 1] - 1)


@pytest.mark.parametrize("place", [in_padding, over_a_border, on_a_first_token, before_the_row_before])
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_a_span_that_is_not_inside_one_segment_is_found(sound, tmp_path, kind, place):
    dataset = copy(sound[kind], tmp_path / "data")
    found = arrays_of(dataset)
    span, start = place(found)
    rewrite(dataset, "train/span_start", set_item(span, start))
    problems = find_problems(dataset)
    assert {each.code for each in problems} <= {"F024", "F027"}
    assert [each.place for each in problems if each.code == "F027"] == [f"train row {found['row'][span]}"]


def test_spans_that_overlap_are_found(chats):
    rewrite(chats, "train/span_start", set_item(*on_the_span_before(arrays_of(chats))))
    assert codes(chats) == ["F027"]


def test_spans_that_touch_are_sound(chats):
    found = arrays_of(chats)
    span, start = on_the_span_before(found)
    rewrite(chats, "train/span_start", set_item(span, start + 1))
    assert codes(chats) == []


@pytest.mark.parametrize("length", [0, 2**32 - 1])
def test_a_span_of_no_or_of_too_many_tokens_is_found(chats, length):
    rewrite(chats, "train/span_length", set_item(2, length))
    assert codes(chats) == ["F024", "F027"]


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_a_segment_without_a_target_is_found(sound, tmp_path, kind):
    """The first span of a side is where its prompt ends, so there must be one."""
    dataset = copy(sound[kind], tmp_path / "data")
    found = arrays_of(dataset)
    span = int(np.flatnonzero(np.bincount(found["segment"])[found["segment"]] == 1)[0])  # alone in its segment
    row, gone = found["row"][span], int(found["span_length"][span])
    for name in ("span_start", "span_length"):
        rewrite(dataset, f"train/{name}", lambda values: np.delete(values, span))
    rewrite(dataset, "train/span_offsets", lambda values: values - (np.arange(len(values)) > row))
    rewrite(dataset, "train/row_targets", less(row, gone))
    if kind == "preference":
        assert found["segment"][span] % 2 == 0
        rewrite(dataset, "train/row_chosen_targets", less(row, gone))
    splits = json.loads((dataset / "MANIFEST.json").read_text())["splits"]
    splits["train"]["spans"] -= 1
    splits["train"]["targets"] -= gone
    reseal(dataset, splits=splits)
    assert [(each.code, each.place) for each in find_problems(dataset)] == [("F027", f"train row {row}")]


@pytest.mark.parametrize(("place", "value"), [(0, 1), (3, 0), (-1, 1), (-1, 10**15), (2, -5)])
def test_span_offsets_that_do_not_ascend_to_the_number_of_spans_are_found(chats, place, value):
    rewrite(chats, "train/span_offsets", set_item(place, value))
    problems = find_problems(chats)
    assert [(each.code, each.place) for each in problems] == [("F020", "train/span_offsets")]


@pytest.mark.parametrize("name", ["row_targets", "row_chosen_targets"])
@pytest.mark.parametrize("value", [0, 2**32 - 1])
def test_wrong_targets_of_a_row_are_found(pairs, name, value):
    rewrite(pairs, f"train/{name}", set_item(4, value))
    problems = [(each.code, each.place) for each in find_problems(pairs) if each.code != "F026"]
    assert problems == [("F024", "train row 4")]


def test_a_later_piece_of_a_conversation_is_found(chats):
    rewrite(chats, "train/segment_offset", set_item(3, 7))
    assert codes(chats) == ["F044", "F034"]


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("pair_offsets", 0, 1),
        ("pair_offsets", 3, 0),
        ("pair_offsets", -1, 10**15),
        ("pair_offsets", 0, -(2**63)),  # twice this is 0 in 64 bits
        ("pair_segments", (0, 0), 1),
        ("pair_segments", (3, 1), 2**64 - 1),
        ("pair_segments", slice(2, 4), 0),
    ],
)
def test_pairs_that_are_not_the_neighbours_of_their_rows_are_found(pairs, name, place, value):
    rewrite(pairs, f"train/{name}", set_item(place, value))
    assert [(each.code, each.place) for each in find_problems(pairs)] == [("F028", f"train/{name}")]


def test_exchanged_sides_in_the_list_of_pairs_are_found(pairs):
    rewrite(pairs, "train/pair_segments", lambda values: values[:, ::-1].copy())
    assert codes(pairs) == ["F028"]


def test_a_pair_that_is_missing_is_found_though_the_manifest_counts_without_it(pairs):
    rewrite(pairs, "train/pair_segments", lambda values: values[:-1])
    splits = json.loads((pairs / "MANIFEST.json").read_text())["splits"]
    splits["train"]["pairs"] -= 1
    reseal(pairs, splits=splits)
    assert codes(pairs) == ["F028"]


def test_sides_of_different_documents_are_found(pairs):
    documents = arrays_of(pairs)["segment_document"]
    rewrite(pairs, "train/segment_document", set_item(5, next(n for n in documents if n != documents[5])))
    assert codes(pairs) == ["F028"]


def test_a_row_with_half_a_pair_is_found(pairs):
    offsets = arrays_of(pairs)["row_offsets"]
    row = int(np.flatnonzero(np.diff(offsets) > 2)[0])
    rewrite(pairs, "train/row_offsets", set_item(row + 1, offsets[row + 1] - 1))
    assert "F028" in codes(pairs)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("by", [-1, 1])
def test_a_side_that_is_not_where_its_document_has_it_is_found(pairs, side, by):
    """As many tokens are cut from the one prompt as from the other, so each place follows from the other."""
    offset = arrays_of(pairs)["segment_offset"]
    place = int(np.flatnonzero(offset[::2] > 0)[0]) * 2 + side
    rewrite(pairs, "train/segment_offset", set_item(place, int(offset[place]) + by))
    assert codes(pairs) == ["F028"]


def test_sides_that_changed_their_places_are_found(pairs):
    """The rejected answer would be preferred, and every sum would still close."""
    rewrite(pairs, "train/segment_offset", lambda values: values.reshape(-1, 2)[:, ::-1].ravel())
    assert codes(pairs) == ["F028"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("span_start", lambda values: values.astype(np.uint64)),
        ("span_length", lambda values: values[:-1]),
        ("span_offsets", lambda values: values[:-1]),
        ("pair_offsets", lambda values: values.astype(np.uint64)),
        ("pair_segments", lambda values: values.astype(np.int64)),
        ("pair_segments", lambda values: values.ravel()),
        ("row_chosen_targets", lambda values: values[1:]),
    ],
)
def test_an_array_of_another_shape_or_dtype_is_found(pairs, name, change):
    rewrite(pairs, f"train/{name}", change)
    assert [(each.code, each.place) for each in find_problems(pairs)] == [("F010", f"train/{name}")]


@pytest.mark.parametrize("name", ["span_offsets", "span_start", "pair_offsets", "pair_segments", "row_chosen_targets"])
def test_a_missing_array_is_found(pairs, name):
    for path in sorted((pairs / "train" / name).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (pairs / "train" / name).rmdir()
    reseal(pairs)
    assert set(codes(pairs)) == {"F010"}
