"""Sample rows: spread over the dataset, cut to what a page holds, and every cut counted."""

from pathlib import Path

import pytest
import small_datasets

from llmt_prep.html import samples as module
from llmt_prep.html.samples import samples
from llmt_prep.inspection import inspect_row
from llmt_shared.dataset import Dataset, open_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(small_datasets.build(tmp_path_factory.mktemp("samples")))


def test_samples_reach_from_the_first_row_to_the_last(dataset):
    rows = [(sample.split, sample.row) for sample in samples(dataset)]
    last = len(dataset.train) - 1
    assert rows == [("train", 0), ("train", last // 3), ("train", 2 * last // 3), ("train", last), ("validation", 0)]


def test_a_dataset_of_few_rows_shows_each_once(tmp_path: Path):
    notes = {"path": str(tmp_path / "corpus" / "notes.txt"), "record": "line", "tokens": 100}
    small = open_dataset(small_datasets.build(tmp_path, budget=None, sources={"notes": notes}, holdout={"fraction": 0}))
    assert len(small.train) < 4
    assert [(sample.split, sample.row) for sample in samples(small)] == [
        ("train", row) for row in range(len(small.train))
    ]


def test_a_sample_holds_what_inspect_shows(dataset):
    for sample in samples(dataset):
        view = inspect_row(dataset, sample.split, sample.row)
        assert [piece.place for piece in sample.pieces] == [segment.place for segment in view.segments]
        assert sample.strip == tuple((segment.source, segment.length) for segment in view.segments)
        assert sample.padding == view.padding
        tokens = [token for piece in sample.pieces for token in piece.tokens]
        runs = [run for segment in view.segments for run in segment.tokens]
        assert [token.ids for token in tokens] == [" ".join(map(str, run.ids)) for run in runs]
        assert ["t" in token.style for token in tokens] == [run.targets > 0 for run in runs]
        assert ["x" in token.style for token in tokens] == [run.is_control for run in runs]


def test_what_is_cut_is_counted(dataset, monkeypatch):
    monkeypatch.setattr(module, "_MOST_SEGMENTS", 1)
    monkeypatch.setattr(module, "_MOST_OF_SEGMENT", 3)
    for sample in samples(dataset):
        assert len(sample.pieces) + sample.left_out == len(sample.strip)
        for piece in sample.pieces:
            shown = sum(len(token.ids.split()) for token in piece.tokens)
            assert len(piece.tokens) <= 3
            assert shown + piece.left_out == piece.length


def test_control_characters_are_made_visible(dataset):
    shown = "".join(token.text for sample in samples(dataset) for piece in sample.pieces for token in piece.tokens)
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\u202e"}
