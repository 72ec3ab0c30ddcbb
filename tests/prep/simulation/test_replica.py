"""A token store that is made up: planning sees in it what the sample holds."""

from pathlib import Path

import numpy as np
import pytest
from made_up_samples import mix

from llmt_prep.selection import select
from llmt_prep.simulation.replica import write_store
from llmt_prep.simulation.tokenize_trial import Documents
from llmt_prep.store import open_unit


def sample(count: int, seed: int, *, pairs: bool = False) -> Documents:
    random = np.random.default_rng(seed)
    lengths = random.integers(10, 300, count)
    outline = np.stack([lengths // 4, lengths // 2], axis=1).astype(np.uint32) * pairs
    return Documents(lengths, outline.astype(np.uint32), np.full(count, 2 * pairs))


def test_each_turn_of_the_sample_is_there_in_units_of_its_size(tmp_path: Path) -> None:
    one, two = sample(100, 1), sample(30, 2)
    corpus = write_store(tmp_path, [one, two], [300, 45], [70, 20], seed=0)
    assert np.diff(corpus.document_borders).tolist() == [70, 70, 70, 70, 20, 20, 20, 5]
    assert corpus.source_borders.tolist() == [0, 300, 345]
    assert sorted(corpus.lengths(0, 300)) == sorted(np.tile(one.length, 3))
    assert corpus.token_borders[-1] == corpus.lengths(0, 345).sum()


def test_every_unit_is_whole(tmp_path: Path) -> None:
    corpus = write_store(tmp_path, [sample(50, 3, pairs=True)], [120], [40], seed=0)
    for number, tokens in enumerate(np.diff(corpus.token_borders).tolist()):
        assert open_unit(corpus.directory(number)).meta == corpus.open_unit(number).meta
        assert len(open_unit(corpus.directory(number)).tokens) == tokens


def test_outlines_of_pairs_come_with_their_lengths(tmp_path: Path) -> None:
    corpus = write_store(tmp_path, [sample(50, 3, pairs=True)], [50], [50], seed=0)
    assert np.array_equal(corpus.outlines(0, 50), np.stack([corpus.lengths(0, 50) // 4, corpus.lengths(0, 50) // 2], 1))


def test_it_can_be_planned(tmp_path: Path) -> None:
    corpus = write_store(tmp_path, [sample(100, 1)], [1000], [100], seed=0)
    (selection,) = select(mix({"a": {"epochs": 1.5}}), corpus).mixture.selections
    assert selection.documents == 1000
    assert selection.epochs == pytest.approx(1.5, rel=0.01)
