"""expand against loops over rows and segments that a reader can check by eye."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmt_shared.segments import (
    IGNORE,
    Spans,
    count_targets,
    expand,
    label_places,
    labels,
    lay_out,
    ranges,
)

LENGTH = 12


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[np.ndarray, list[list[int]]]:
    """Tokens [R, L] and the segment lengths of each row; a row may be empty or full."""
    rows = draw(st.lists(st.lists(st.integers(1, LENGTH), max_size=5), min_size=1, max_size=5))
    rows = [[n for place, n in enumerate(row) if sum(row[: place + 1]) <= LENGTH] for row in rows]
    tokens = np.arange(1, len(rows) * LENGTH + 1, dtype=np.uint16).reshape(len(rows), LENGTH)
    for row, lengths in zip(tokens, rows, strict=True):
        row[sum(lengths) :] = 0
    return tokens, rows


def expand_rows(tokens: np.ndarray, rows: list[list[int]], spans: Spans | None = None):
    lengths = np.array([n for row in rows for n in row], np.uint32)
    return expand(tokens, np.array([len(row) for row in rows]), lengths, spans)


def places(rows: list[list[int]]) -> Iterator[tuple[int, int, int]]:
    """(segment id, index in its piece, length of its piece) of every token, padding as id 0."""
    for row in rows:
        for number, length in enumerate(row, start=1):
            yield from ((number, index, length) for index in range(length))
        tail = LENGTH - sum(row)
        yield from ((0, index, tail) for index in range(tail))


@given(packed_rows())
def test_segment_ids_count_segments_from_one_in_each_row(case):
    tokens, rows = case
    assert expand_rows(tokens, rows).segment_ids.tolist() == [number for number, _, _ in places(rows)]


@given(packed_rows())
def test_positions_restart_with_every_piece(case):
    tokens, rows = case
    assert expand_rows(tokens, rows).position_ids.tolist() == [index for _, index, _ in places(rows)]


@given(packed_rows())
def test_cu_seqlens_are_the_borders_of_pieces_and_rows(case):
    tokens, rows = case
    borders = [place for place, (_, index, _) in enumerate(places(rows)) if index == 0]
    assert expand_rows(tokens, rows).cu_seqlens.tolist() == [*borders, tokens.size]


@given(packed_rows())
def test_label_is_the_next_token_of_the_same_segment(case):
    tokens, rows = case
    flat = tokens.ravel().tolist()
    wanted = [
        flat[place + 1] if number and index + 1 < length else IGNORE
        for place, (number, index, length) in enumerate(places(rows))
    ]
    assert expand_rows(tokens, rows).labels.tolist() == wanted


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=9))
def test_ranges_count_up_one_after_another(pairs):
    first, count = (np.array(column, np.int64) for column in (zip(*pairs, strict=True) if pairs else ([], [])))
    assert ranges(first, count).tolist() == [number for start, n in pairs for number in range(start, start + n)]


def test_what_a_caller_does_to_ranges_does_not_change_the_next():
    ranges(np.array([0]), np.array([8]))[:] = 9
    assert ranges(np.array([0]), np.array([8])).tolist() == list(range(8))


def lay_out_rows(rows: list[list[int]]):
    """Segments have the sources 0, 1, .."""
    lengths = np.array([n for row in rows for n in row], np.uint32)
    per_row = np.array([len(row) for row in rows])
    return lay_out((len(rows), LENGTH), per_row, lengths, np.arange(len(lengths)))


@given(packed_rows())
def test_every_row_that_is_not_full_ends_with_a_piece_of_padding(case):
    _, rows = case
    pieces, wanted, source = lay_out_rows(rows), [], 0
    for row in rows:
        wanted += [(n, source + place) for place, n in enumerate(row)]
        wanted += [(LENGTH - sum(row), -1)] * (sum(row) < LENGTH)
        source += len(row)
    assert list(zip(pieces.length.tolist(), pieces.source.tolist(), strict=True)) == wanted
    assert pieces.per_row.tolist() == [len(row) + (sum(row) < LENGTH) for row in rows]
    assert pieces.borders.tolist() == np.cumsum([0, *(n for n, _ in wanted)]).tolist()


@given(packed_rows(), st.integers(1, 6))
def test_parts_of_pieces_are_those_of_fewer_rows(case, num_rows):
    _, rows = case
    parts = list(lay_out_rows(rows).parts(num_rows))
    starts = range(0, len(rows), num_rows)
    assert len(parts) == len(starts)
    for part, start in zip(parts, starts, strict=True):
        alone, before = lay_out_rows(rows[start : start + num_rows]), sum(map(len, rows[:start]))
        source = np.where(alone.source < 0, -1, alone.source + before)
        for found, wanted in zip(part, alone._replace(source=source), strict=True):
            assert found.tolist() == wanted.tolist()


@given(packed_rows(), st.booleans())
def test_the_places_of_labels_are_those_that_are_not_ignored(case, has_spans):
    tokens, rows = case
    pieces, spans = lay_out_rows(rows), Spans(np.array([2]), np.array([LENGTH // 2])) if has_spans else None
    found = labels(tokens.ravel(), pieces, spans)
    assert label_places(found, pieces, spans).tolist() == [t for t, n in enumerate(found.tolist()) if n != IGNORE]


@given(packed_rows())
def test_targets_counted_are_the_labels_that_count(case):
    tokens, rows = case
    lengths = np.array([n for row in rows for n in row], np.uint32)
    assert count_targets(lengths).sum() == (expand_rows(tokens, rows).labels != IGNORE).sum()


@given(packed_rows(), st.data())
def test_only_tokens_inside_spans_are_targets(case, data):
    tokens, rows = case
    is_target = np.array([data.draw(st.booleans()) and number > 0 for number, _, _ in places(rows)])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_target.astype(int), [0]])))
    spans = Spans(edges[::2], edges[1::2] - edges[::2])
    every, some = expand_rows(tokens, rows).labels, expand_rows(tokens, rows, spans).labels
    wanted = [
        label if place + 1 < len(is_target) and is_target[place + 1] else IGNORE for place, label in enumerate(every)
    ]
    assert some.tolist() == wanted


def test_spans_that_touch_are_one_run():
    tokens = np.arange(1, 7).reshape(1, 6)
    spans = Spans(np.array([1, 3]), np.array([2, 2]))
    assert expand(tokens, np.array([1]), np.array([6]), spans).labels.tolist() == [2, 3, 4, 5, IGNORE, IGNORE]


@pytest.mark.parametrize(
    ("start", "length", "labels"),
    [
        ([4], [2], [5, 6]),  # the end of the first row, which is full
        ([10], [1], [11]),  # the last token of the last segment, before padding
        ([7], [1], [8]),  # the second token of a row: the first predicts it
        ([4, 9], [2, 2], [5, 6, 10, 11]),  # one in each row
        ([4], [6], [5, 6, 8, 10]),  # what crosses segments and rows has no label for their first tokens
        ([10], [2], [11]),  # what reaches into the padding
        ([0], [12], [2, 3, 5, 6, 8, 10, 11]),
        ([], [], []),
    ],
)
def test_spans_at_the_ends_of_segments_and_rows(start, length, labels):
    """Rows of 3 + 3 tokens and of 2 + 3 with one of padding; token t stands at place t - 1."""
    tokens = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 0]], np.uint16)
    spans = Spans(np.array(start, np.int64), np.array(length, np.int64))
    dense = expand(tokens, np.array([2, 2]), np.array([3, 3, 2, 3]), spans)
    assert dense.labels[dense.labels != IGNORE].tolist() == labels
    places = np.flatnonzero(dense.labels != IGNORE)
    assert (dense.labels[places] == places + 2).all()


def test_a_segment_of_one_token_has_no_target():
    assert expand(np.array([[7, 8]]), np.array([2]), np.array([1, 1])).labels.tolist() == [IGNORE, IGNORE]


def test_no_rows_expand_to_nothing():
    dense = expand(np.empty((0, 4), np.uint16), np.empty(0, np.int64), np.empty(0, np.uint32))
    assert dense.cu_seqlens.tolist() == [0]
    assert dense.labels.size == 0


def test_large_token_ids_survive():
    tokens = np.array([[1, 4_000_000_000]], np.uint32)
    assert expand(tokens, np.array([1]), np.array([2])).labels.tolist() == [4_000_000_000, IGNORE]


@pytest.mark.parametrize(("per_row", "lengths"), [([1], [5]), ([1, 1], [2, 2]), ([2], [2]), ([1], [2, 2]), ([0], [1])])
def test_segments_that_do_not_fit_the_rows_are_refused(per_row, lengths):
    with pytest.raises(ValueError):  # noqa: PT011  one kind of mistake, several ways
        expand(np.zeros((len(per_row) if len(per_row) == 1 else 1, 4)), np.array(per_row), np.array(lengths))
