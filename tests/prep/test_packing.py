import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep import packing
from llmt_prep.kernels import best_fit, best_fit_numpy
from llmt_prep.packing import (
    PackedRows,
    Pieces,
    best_fit_decreasing,
    landing,
    pack,
    pack_windows,
    row_tokens,
    split_documents,
    take_rows,
)
from llmt_shared.errors import DataError

CAPACITIES = [1, 2, 3, 7, 16, 127, 1000]


@st.composite
def packable(draw):
    """Lengths that fit a capacity, often equal, as real ones are."""
    capacity = draw(st.sampled_from(CAPACITIES))
    few = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=6))
    any_length = st.integers(1, capacity)
    lengths = draw(st.lists(st.sampled_from(few) | any_length, max_size=200))
    return np.array(lengths, np.int32), capacity


@st.composite
def documents(draw):
    capacity = draw(st.sampled_from([2, 3, 7, 16]))
    return np.array(draw(st.lists(st.integers(0, 5 * capacity), max_size=60)), np.int64), capacity


def naive_best_fit(lengths, capacity):
    """O(n * rows): every item, longest first, goes to the tightest row that takes it; else to a new one."""
    rows, free = [], []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row in range(len(rows)) if free[row] >= lengths[item]]
        if fitting:
            row = min(fitting, key=lambda r: free[r])
        else:
            row = len(rows)
            rows.append([])
            free.append(capacity)
        rows[row].append(item)
        free[row] -= lengths[item]
    return rows, free


def as_tuples(pieces):
    return list(zip(*(column.tolist() for column in pieces), strict=True))


def free_space(rows, lengths, capacity):
    return [capacity - sum(lengths[rows.items[a:b]].tolist()) for a, b in pairwise(rows.offsets)]


@given(packable())
def test_every_item_is_packed_exactly_once(case):
    lengths, capacity = case
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(rows.items.tolist()) == list(range(len(lengths)))
    assert rows.offsets[0] == 0
    assert rows.offsets[-1] == len(lengths)
    assert np.all(np.diff(rows.offsets) > 0)


@given(packable())
def test_no_row_overflows(case):
    lengths, capacity = case
    assert min(free_space(best_fit_decreasing(lengths, capacity), lengths, capacity), default=0) >= 0


@given(packable())
def test_free_spaces_are_those_of_naive_best_fit_decreasing(case):
    lengths, capacity = case
    free = free_space(best_fit_decreasing(lengths, capacity), lengths, capacity)
    assert Counter(free) == Counter(naive_best_fit(lengths.tolist(), capacity)[1])


@given(packable())
def test_no_two_rows_would_fit_together(case):
    lengths, capacity = case
    used = sorted(capacity - free for free in free_space(best_fit_decreasing(lengths, capacity), lengths, capacity))
    assert len(used) < 2 or used[0] + used[1] > capacity


@given(packable())
def test_items_of_a_row_are_in_falling_length_and_rising_index(case):
    lengths, capacity = case
    rows = best_fit_decreasing(lengths, capacity)
    for a, b in pairwise(rows.offsets):
        keys = [(-lengths[item], item) for item in rows.items[a:b]]
        assert keys == sorted(keys)


@given(packable())
def test_numpy_gives_the_rows_that_numba_gives(case):
    lengths, capacity = case
    compiled = packing._assigned(best_fit, lengths, capacity)
    plain = packing._assigned(best_fit_numpy, lengths, capacity)
    np.testing.assert_array_equal(compiled.items, plain.items)
    np.testing.assert_array_equal(compiled.offsets, plain.offsets)


@pytest.mark.parametrize("capacity", [2, 3, 4095, 131_072, 300_000])
def test_a_large_corpus_packs_the_same_with_numpy(capacity, monkeypatch):
    rng = np.random.default_rng(7)
    lengths = np.minimum(rng.lognormal(6, 1.5, 20_000).astype(np.int64) + 1, capacity)
    monkeypatch.setattr(best_fit_numpy, "_CHUNK", 4096)
    plain = best_fit_decreasing(lengths, capacity)
    monkeypatch.setattr(packing, "_MANY_ITEMS", 0)
    compiled = best_fit_decreasing(lengths, capacity)
    np.testing.assert_array_equal(compiled.items, plain.items)
    np.testing.assert_array_equal(compiled.offsets, plain.offsets)
    assert len(plain.offsets) - 1 <= 1.001 * -(-lengths.sum() // capacity) + 1


def test_without_numba_the_rows_come_from_numpy():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np\n"
        "from llmt_prep import packing\n"
        "from llmt_prep.packing import best_fit_decreasing\n"
        "packing._MANY_ITEMS = 0\n"
        "print(best_fit_decreasing(np.array([2, 9, 3, 5, 4]), 9).items.tolist())\n"
        "print('llmt_prep.kernels.best_fit' in sys.modules)"
    )
    assert _python(code) == "[1, 3, 4, 2, 0]\nFalse"


def test_few_items_are_packed_without_waiting_for_numba():
    code = (
        "import sys, numpy as np\n"
        "from llmt_prep.packing import pack\n"
        "lengths = np.arange(1, 100_000) % 100 + 1\n"
        "print(len(pack(lengths, 128, 'split').items.length), 'numba' in sys.modules)\n"
        "print(len(pack(np.tile(lengths, 4), 128, 'split').items.length), 'numba' in sys.modules)"
    )
    assert _python(code) == "99999 False\n399996 True"


def test_importing_packing_loads_no_numba():
    assert _python("import sys, llmt_prep.packing; print('numba' in sys.modules)") == "False"


def _python(code):
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_no_items_need_no_rows():
    rows = best_fit_decreasing(np.empty(0, np.int64), 8)
    assert rows.offsets.tolist() == [0]
    assert rows.items.tolist() == []


@given(packable())
def test_rows_larger_than_all_items_need_no_tables_of_their_size(case):
    """The largest possible row would take 8 bytes in each of several tables for each of its 2^31 tokens."""
    lengths, _ = case
    largest, enough = (best_fit_decreasing(lengths, capacity) for capacity in (2**31 - 1, int(lengths.sum()) + 7))
    assert largest.offsets.tolist() == enough.offsets.tolist() == ([0, len(lengths)] if len(lengths) else [0])
    assert largest.items.tolist() == enough.items.tolist()


def test_read_only_and_strided_lengths_are_packed():
    lengths = np.arange(1, 9, dtype=np.uint32)[::-1]
    lengths.setflags(write=False)
    assert sorted(free_space(best_fit_decreasing(lengths, 8), lengths, 8)) == [0, 0, 0, 0, 4]


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_outside_the_row_is_refused(length):
    with pytest.raises(ValueError, match=f"{length}.*a row takes 1 to 8"):
        best_fit_decreasing(np.array([length]), 8)


@pytest.mark.parametrize("capacity", [0, 2**31])
def test_an_impossible_capacity_is_refused(capacity):
    with pytest.raises(ValueError, match="a row cannot have"):
        best_fit_decreasing(np.array([1]), capacity)


@given(documents())
def test_split_pieces_cover_each_document_in_order(case):
    lengths, capacity = case
    pieces = split_documents(lengths, capacity, "split")
    for document, length in enumerate(lengths):
        mine = pieces.document == document
        ends = pieces.offset[mine] + pieces.length[mine]
        assert pieces.offset[mine].tolist() == [0, *ends.tolist()][: mine.sum()]
        assert ends.max(initial=0) == length
    assert np.all(np.diff(pieces.document) >= 0)


@given(documents())
def test_splits_are_minimal_and_full_but_the_last(case):
    lengths, capacity = case
    pieces = split_documents(lengths, capacity, "split")
    counts = np.bincount(pieces.document, minlength=len(lengths))
    np.testing.assert_array_equal(counts, np.ceil(lengths / capacity))
    is_last = np.append(np.diff(pieces.document) > 0, True)[: len(pieces.document)]
    assert np.all(pieces.length[~is_last] == capacity)
    assert np.all((pieces.length >= 1) & (pieces.length <= capacity))


@given(documents(), st.sampled_from(["split", "truncate", "drop"]))
def test_landing_counts_the_tokens_of_the_pieces(case, overflow):
    lengths, capacity = case
    pieces = split_documents(lengths, capacity, overflow)
    landed = np.bincount(pieces.document, weights=pieces.length, minlength=len(lengths))
    np.testing.assert_array_equal(landing(lengths, capacity, overflow), landed)


@given(documents(), st.sampled_from(["split", "truncate", "drop"]))
def test_no_document_that_fits_is_cut(case, overflow):
    lengths, capacity = case
    pieces = split_documents(lengths, capacity, overflow)
    for document in np.flatnonzero((lengths > 0) & (lengths <= capacity)):
        assert pieces.length[pieces.document == document].tolist() == [lengths[document]]


def test_truncate_keeps_the_beginning_and_drop_nothing():
    lengths = np.array([3, 10, 8])
    assert split_documents(lengths, 8, "truncate").length.tolist() == [3, 8, 8]
    assert split_documents(lengths, 8, "truncate").offset.tolist() == [0, 0, 0]
    assert split_documents(lengths, 8, "drop").document.tolist() == [0, 2]


def test_error_names_the_first_document_that_is_too_long():
    with pytest.raises(DataError, match=r"document 2 has 9 tokens, more than the 8 .*sequence\.overflow"):
        split_documents(np.array([8, 1, 9, 20]), 8, "error")
    assert split_documents(np.array([8, 1]), 8, "error").length.tolist() == [8, 1]


def test_unsigned_lengths_on_disk_are_split():
    assert split_documents(np.array([0, 5], np.uint32), 4, "split").offset.tolist() == [0, 4]


@st.composite
def window_streams(draw):
    capacity = draw(st.sampled_from([2, 7, 100]))
    sizes = st.lists(st.lists(st.integers(1, capacity), max_size=40), max_size=6)
    out, document = [], 0
    for lengths in draw(sizes):
        ids = np.arange(document, document + len(lengths))
        document += len(lengths)
        out.append(Pieces(ids, ids * 10, np.array(lengths, np.int32)))
    return out, capacity


@given(window_streams(), st.sampled_from([0.0, 0.9, 0.98, 1.0]), st.sampled_from([0, 5, 1000]))
def test_windows_pack_every_piece_once_with_its_columns(case, carry, max_carried):
    stream, capacity = case
    packed = list(pack_windows(stream, capacity, carry, max_carried))
    wanted = sorted(piece for window in stream for piece in as_tuples(window))
    assert sorted(piece for rows in packed for piece in as_tuples(rows.items)) == wanted
    assert all(row_tokens(rows).max(initial=0) <= capacity for rows in packed)
    assert all(np.all(np.diff(rows.offsets) > 0) for rows in packed)


@given(window_streams())
def test_rows_that_are_not_full_enough_wait_for_the_end(case):
    stream, capacity = case
    packed = list(pack_windows(iter(stream), capacity, 0.9))
    for rows in packed[: len(stream)]:
        assert row_tokens(rows).min(initial=capacity) >= 0.9 * capacity
    for rows in packed[len(stream) :]:
        assert row_tokens(rows).max() < 0.9 * capacity


@given(window_streams(), st.integers(0, 20))
def test_no_more_items_wait_than_allowed(case, max_carried):
    stream, capacity = case
    seen = 0
    packed = pack_windows(stream, capacity, 1.0, max_carried)
    for window, rows in zip(stream, packed, strict=False):  # what waits at the end comes after the windows
        seen += len(window.length) - len(rows.items.length)
        assert 0 <= seen <= max_carried


def test_lengths_that_never_fit_together_do_not_pile_up():
    window = Pieces(np.arange(100), np.zeros(100, np.int64), np.full(100, 60, np.int32))
    waiting = 0
    for rows in pack_windows([window] * 50, 100, max_carried=150):
        waiting += 100 - len(rows.items.length)
        assert waiting <= 150


def test_one_window_is_packed_as_a_whole():
    lengths = np.random.default_rng(3).integers(1, 65, 500).astype(np.int32)
    pieces = Pieces(np.arange(500), np.zeros(500, np.int64), lengths)
    num_rows = sum(len(rows.offsets) - 1 for rows in pack_windows([pieces], 64))
    assert num_rows == len(best_fit_decreasing(lengths, 64).offsets) - 1


def test_windows_with_carry_fill_rows_as_one_pack_does():
    lengths = np.minimum(np.random.default_rng(5).lognormal(6, 1.2, 50_000).astype(np.int64) + 1, 4096)
    for window in (1000, 10_000):
        packed = pack(lengths, 4096, "split", window=window)
        assert lengths.sum() / (4096 * (len(packed.offsets) - 1)) > 0.999


def test_carry_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"0\.\.1, not 1\.5"):
        next(pack_windows([], 8, 1.5))


@given(documents(), st.integers(1, 20), st.sampled_from(["split", "truncate", "drop"]))
def test_pack_places_what_splitting_gives(case, window, overflow):
    lengths, capacity = case
    packed = pack(lengths, capacity, overflow, window=window, seed=1)
    wanted = sorted(as_tuples(split_documents(lengths, capacity, overflow)))
    assert sorted(as_tuples(packed.items)) == wanted


def test_the_seed_permutes_rows_and_nothing_else():
    lengths = np.random.default_rng(3).integers(1, 200, 300)
    first, again, other = (pack(lengths, 64, "split", window=50, seed=seed) for seed in (1, 1, 2))
    assert _contents(first) == _contents(again)
    assert _contents(first) != _contents(other)
    assert sorted(_contents(first)) == sorted(_contents(other))


def test_pack_names_a_document_that_is_too_long_by_its_place_in_the_whole():
    with pytest.raises(DataError, match="document 5 has 9 tokens"):
        pack(np.array([1, 1, 1, 1, 1, 9]), 8, "error", window=2)


def test_take_rows_reorders_and_repeats():
    rows = PackedRows(np.array([0, 2, 2, 3]), Pieces(np.arange(3), np.arange(3), np.arange(3, dtype=np.int32)))
    taken = take_rows(rows, np.array([2, 1, 0]))
    assert taken.offsets.tolist() == [0, 1, 1, 3]
    assert taken.items.document.tolist() == [2, 0, 1]
    assert row_tokens(taken).tolist() == [2, 0, 1]


def _contents(rows):
    pieces = as_tuples(rows.items)
    return [tuple(pieces[a:b]) for a, b in pairwise(rows.offsets)]


@st.composite
def documents_with_targets(draw):
    """Lengths, tokens before each first target, and a capacity that is even or odd."""
    capacity = draw(st.sampled_from([2, 3, 7, 16]))
    sizes = draw(st.lists(st.integers(2, 4 * capacity), min_size=1, max_size=40))
    firsts = [draw(st.integers(1, size - 1)) for size in sizes]
    return np.array(sizes), np.array(firsts, draw(st.sampled_from([np.uint32, np.int64]))), capacity


@given(documents_with_targets())
def test_truncating_drops_what_keeps_no_target(case):
    lengths, first_target, capacity = case
    wanted = [
        length if length <= capacity else capacity if first < capacity else 0
        for length, first in zip(lengths.tolist(), first_target.tolist(), strict=True)
    ]
    assert landing(lengths, capacity, "truncate", first_target).tolist() == wanted


@given(documents_with_targets())
def test_truncating_prompts_takes_as_few_tokens_as_fit_equally_from_both_sides(case):
    lengths, first_target, capacity = case
    landed = landing(lengths, capacity, "truncate_prompt", first_target)
    assert (landed <= capacity).all()
    for length, first, kept in zip(lengths.tolist(), first_target.tolist(), landed.tolist(), strict=True):
        fitting = [cut for cut in range(first) if length - 2 * cut <= capacity]  # leaves a token of each prompt
        assert kept == (length - 2 * fitting[0] if fitting else 0)


@given(documents_with_targets(), st.sampled_from(["split", "truncate", "truncate_prompt", "drop"]))
def test_pieces_have_the_tokens_that_land_whatever_is_a_target(case, overflow):
    lengths, first_target, capacity = case
    pieces = split_documents(lengths, capacity, overflow, first_target)
    landed = np.bincount(pieces.document, pieces.length, len(lengths))
    np.testing.assert_array_equal(landing(lengths, capacity, overflow, first_target), landed)
    assert (pieces.length >= 1).all()
    assert (pieces.length <= capacity).all()


def test_targets_of_the_longest_documents_are_compared_without_overflow():
    lengths, first_target = np.array([2**32 - 1, 2**32 - 1], np.uint32), np.array([2**32 - 2, 5], np.uint32)
    assert landing(lengths, 8, "truncate", first_target).tolist() == [0, 8]
    assert landing(lengths, 8, "truncate_prompt", first_target).tolist() == [7, 0]
    assert landing(lengths, 2**31 - 1, "truncate_prompt", first_target).tolist() == [2**31 - 1, 0]
