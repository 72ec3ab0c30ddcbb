"""The survey is what a plain loop over all documents counts, however it is read."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_corpus import Arrays, hashes

from llmt_prep import survey as surveys
from llmt_prep.config import SequenceConfig
from llmt_prep.holdout import held_out
from llmt_prep.survey import LIGHTEST, survey

BLOCK = 3 * LIGHTEST

lengths_of_a_source = st.lists(st.integers(1, 2000), max_size=40)


def naive_blocks(lengths, first_document, first_token):
    documents, tokens, weight, block = [], [], 0, -1
    for number, length in enumerate(lengths):
        if weight // BLOCK != block:
            block = weight // BLOCK
            documents.append(first_document + number)
            tokens.append(first_token + sum(lengths[:number]))
        weight += max(length, LIGHTEST)
    return [*documents, first_document + len(lengths)], [*tokens, first_token + sum(lengths)]


def lands(length, sequence):
    if length <= sequence.length or sequence.overflow in {"split", "error"}:
        return length
    return sequence.length if sequence.overflow == "truncate" else 0


@given(
    st.lists(lengths_of_a_source, min_size=1, max_size=3),
    st.sampled_from(["split", "truncate", "drop", "error"]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([1, 7, 1000]),
)
def test_a_survey_counts_what_a_loop_counts(sources, overflow, fraction, piece):
    whole, text_hashes = list(chain(*sources)), hashes(sum(map(len, sources)))
    borders = np.cumsum([0, *map(len, sources)])
    sequence = SequenceConfig(length=900, overflow=overflow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surveys, "PIECE", piece)
        found = survey(Arrays(np.array(whole, np.int64), text_hashes), borders, sequence, fraction, BLOCK)
    held = held_out(text_hashes, fraction)
    for mine, lengths, first in zip(found, sources, borders.tolist(), strict=False):
        is_held = held[first : first + len(lengths)]
        long = [first + i for i, length in enumerate(lengths) if length > 900]
        assert (mine.documents, mine.tokens) == (len(lengths), sum(lengths))
        assert mine.held_out_documents == sum(is_held)
        assert mine.held_out_tokens == sum(np.array(lengths, int)[is_held])
        assert mine.available == sum(lands(n, sequence) for n, out in zip(lengths, is_held, strict=True) if not out)
        assert (mine.too_long, mine.first_too_long) == (len(long), long[0] if long else -1)
        documents, tokens = naive_blocks(lengths, first, sum(whole[:first]))
        assert (mine.blocks.documents.tolist(), mine.blocks.tokens.tolist()) == (documents, tokens)


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=80))
def test_a_block_is_bounded_in_tokens_and_documents(lengths):
    (found,) = survey(Arrays(np.array(lengths)), np.array([0, len(lengths)]), SequenceConfig(length=8), 0.0, BLOCK)
    assert np.diff(found.blocks.documents).min() >= 1
    assert np.diff(found.blocks.documents).max() <= BLOCK / LIGHTEST
    assert np.diff(found.blocks.tokens).max() < BLOCK + max(lengths)


def test_blocks_of_a_source_do_not_depend_on_the_sources_before_it():
    lengths, others = np.arange(1, 3000, 37), np.arange(1, 900, 7)
    (alone,) = survey(Arrays(lengths), np.array([0, len(lengths)]), SequenceConfig(length=8), 0.0, BLOCK)
    borders = np.array([0, len(others), len(others) + len(lengths)])
    after = survey(Arrays(np.concatenate([others, lengths])), borders, SequenceConfig(length=8), 0.0, BLOCK)[1]
    assert (after.blocks.documents - len(others)).tolist() == alone.blocks.documents.tolist()
    assert (after.blocks.tokens - others.sum()).tolist() == alone.blocks.tokens.tolist()


def test_every_document_is_read_once():
    corpus = Arrays(np.full(1000, 600), hashes(1000))
    survey(corpus, np.array([0, 400, 1000]), SequenceConfig(length=8), 0.1, BLOCK)
    assert corpus.read == 1000
