"""Rows counted by their tokens and targets, against plain loops; histograms that lose no row."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import small_datasets
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep.html import row_counts as module
from llmt_prep.html.row_counts import Bin, bins, row_counts
from llmt_shared.dataset import Dataset, open_dataset

row_numbers = st.lists(st.integers(0, 3000), min_size=1, max_size=300)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(small_datasets.build(tmp_path_factory.mktemp("row_counts")))


def counted(numbers: list[int], length: int = 3000) -> np.ndarray:
    return np.bincount(numbers, minlength=length + 1)


@pytest.mark.parametrize("at_once", [1, 40, 1 << 18])
def test_rows_are_counted_by_tokens_and_targets(dataset, monkeypatch, at_once):
    monkeypatch.setattr(module, "_SEGMENTS_AT_ONCE", at_once)
    for split in (dataset.train, dataset.validation):
        rows = [split[row] for row in range(len(split))]
        counts = row_counts(split)
        assert counts.tokens.tolist() == counted([(row.segment_ids > 0).sum() for row in rows], split.length).tolist()
        assert counts.targets.tolist() == counted([(row.labels >= 0).sum() for row in rows], split.length).tolist()


def test_every_row_without_segments_is_counted(tmp_path: Path):
    path = small_datasets.build(tmp_path)
    small_datasets.rewrite(path, "train/row_offsets", lambda offsets: np.append(offsets, offsets[-1:]))
    small_datasets.rewrite(path, "train/row_targets", lambda targets: np.append(targets, 0).astype(np.uint32))
    assert row_counts(open_dataset(path).train).tokens[0] == 1


@given(row_numbers)
def test_every_row_is_in_exactly_one_bin(numbers):
    found = bins(counted(numbers))
    every = [*([found.below] if found.below else []), *found.bins]
    for each in every:
        assert each.rows == sum(each.first <= number <= each.last for number in numbers)
    assert sum(each.rows for each in every) == len(numbers)


@given(row_numbers)
def test_bins_are_equally_wide_and_follow_one_another(numbers):
    found = bins(counted(numbers)).bins
    assert len(found) <= 41  # the first may begin before the lowest number
    assert {each.last + 1 - each.first for each in found} == {found[0].last + 1 - found[0].first}
    assert all(left.last + 1 == right.first for left, right in pairwise(found))


@given(row_numbers)
def test_only_stray_rows_are_gathered(numbers):
    below = bins(counted(numbers)).below
    assert below is None or below.rows <= max(1, len(numbers) // 50)


def test_one_short_row_does_not_squeeze_the_others():
    found = bins(counted([17] + [2990] * 40 + [3000] * 60))
    assert found.below == Bin(17, 2989, 1)
    assert found.bins[0] == Bin(2990, 2990, 40)
    assert found.bins[-1] == Bin(3000, 3000, 60)


def test_no_rows_make_no_bin():
    assert bins(counted([])).bins == ()


def test_a_single_row_is_shown_among_neighbours():
    found = bins(counted([3000]))
    assert (found.below, len(found.bins), found.bins[-1]) == (None, 10, Bin(3000, 3000, 1))
