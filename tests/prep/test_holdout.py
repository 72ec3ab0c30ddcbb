"""Held-out documents are a function of their texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_corpus import Arrays, hashes

from llmt_prep.holdout import held_out, held_out_of


def test_no_hash_is_read_where_nothing_is_held_out():
    corpus = Arrays(np.arange(9))
    assert held_out_of(corpus, 2, 6, 0.0).tolist() == [False] * 4
    corpus.hashes = hashes(9)
    assert held_out_of(corpus, 2, 6, 0.5).tolist() == held_out(hashes(9), 0.5)[2:6].tolist()


def test_no_hash_is_held_out_by_default():
    assert not held_out(np.arange(1000, dtype=np.uint64), 0.0).any()
    assert held_out(np.empty(0, np.uint64), 0.5).shape == (0,)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50), st.floats(0, 0.999))
def test_holding_out_depends_on_each_hash_alone(hashes, fraction):
    together = held_out(np.array(hashes, np.uint64), fraction)
    alone = [held_out(np.array([one], np.uint64), fraction)[0] for one in hashes]
    assert together.tolist() == alone


def test_the_held_out_fraction_is_met_and_grows_by_inclusion():
    hashes = np.arange(200_000, dtype=np.uint64)
    few, more = held_out(hashes, 0.01), held_out(hashes, 0.1)
    assert abs(few.mean() - 0.01) < 0.001
    assert abs(more.mean() - 0.1) < 0.003
    assert np.all(more[few])


def test_which_hashes_are_held_out_never_changes():
    """Data that was validation once must stay out of training in every later release."""
    assert np.flatnonzero(held_out(np.arange(100, dtype=np.uint64), 0.1)).tolist() == [
        8,
        22,
        25,
        37,
        44,
        58,
        62,
        76,
        86,
        92,
    ]


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_senseless_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="held-out fraction"):
        held_out(np.empty(0, np.uint64), fraction)
