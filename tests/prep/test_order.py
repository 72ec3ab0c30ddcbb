"""An epoch's order holds every trainable document once, a group of blocks at a time, whatever else is in the corpus."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_chats import landed, random_chats, targets_of, write_chats
from synthetic_corpus import SHUFFLING, SMALL_BLOCKS, Arrays, hashes, sources_of, write_corpus

from llmt_prep import order
from llmt_prep.config import SequenceConfig
from llmt_prep.holdout import held_out
from llmt_prep.order import Documents, Shuffling, held_out_in_order, in_order
from llmt_prep.survey import LIGHTEST, survey

lengths_of_a_source = st.lists(st.integers(1, 2000), min_size=1, max_size=60)
shufflings = st.sampled_from([SHUFFLING, SMALL_BLOCKS])


def joined(pieces):
    return Documents(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))


def epoch_of(lengths, name="a", epoch=0, shuffling=SMALL_BLOCKS, fraction=0.0):
    """The order of a source that is alone in its corpus."""
    _, (source,) = sources_of({name: (lengths, {})}, shuffling, fraction=fraction)
    return joined(source.in_order(epoch))


@given(lengths_of_a_source, st.integers(0, 3), shufflings, st.sampled_from([0.0, 0.5]), st.sampled_from([1, 5, 10**6]))
def test_an_order_holds_every_trainable_document_once(lengths, epoch, shuffling, fraction, piece):
    trainable = np.flatnonzero(~held_out(hashes(len(lengths)), fraction))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PIECE", piece)
        _, (source,) = sources_of({"a": (lengths, {})}, shuffling, fraction=fraction)
        pieces = list(source.in_order(epoch))
    assert sorted(np.concatenate([[], *(part.document for part in pieces)])) == trainable.tolist()
    if pieces:
        found = joined(pieces)
        addresses = np.cumsum(lengths) - lengths
        assert found.length.tolist() == np.array(lengths)[found.document].tolist()
        assert found.address.tolist() == addresses[found.document].tolist()
        assert found.document.tolist() == epoch_of(lengths, "a", epoch, shuffling, fraction).document.tolist()


@given(lengths_of_a_source, lengths_of_a_source, st.integers(0, 2), shufflings)
def test_an_order_does_not_depend_on_other_sources(lengths, others, epoch, shuffling):
    _, (_, second, _) = sources_of({"b": (others, {}), "a": (lengths, {}), "c": (others, {})}, shuffling)
    alone, together = epoch_of(lengths, "a", epoch, shuffling), joined(second.in_order(epoch))
    assert (together.document - len(others)).tolist() == alone.document.tolist()
    assert (together.address - sum(others)).tolist() == alone.address.tolist()
    assert together.length.tolist() == alone.length.tolist()


def test_an_order_does_not_depend_on_how_units_are_cut(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 2000, 90)
    found = []
    for unit_documents in (1, 7, 1000):
        corpus = write_corpus(tmp_path / str(unit_documents), [[5] * 20, lengths.tolist()], unit_documents)
        surveyed = survey(corpus, corpus.source_borders, SequenceConfig(length=64), 0.2, SMALL_BLOCKS.block_tokens)
        found.append(joined(in_order(corpus, surveyed[1].blocks, 0.2, "a", SMALL_BLOCKS, 1)))
    for other in found[1:]:
        for mine, wanted in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(mine, wanted)


@pytest.mark.parametrize("sides", [1, 2])
def test_documents_keep_their_outlines_in_every_order(tmp_path, sides):
    chats = random_chats(90, sides, 20, seed=3)
    corpus = write_chats(tmp_path, [chats[:20], chats[20:]], 7)
    (_, surveyed) = survey(corpus, corpus.source_borders, SequenceConfig(length=64), 0.3, SMALL_BLOCKS.block_tokens)
    trained = joined(in_order(corpus, surveyed.blocks, 0.3, "a", SMALL_BLOCKS, 1))
    kept = joined(held_out_in_order(corpus, 90, 0.3))
    assert len(trained.document) > 40 > len(kept.document) > 10
    for found in (trained, kept):
        targets = targets_of([chats[document] for document in found.document])
        assert found.outline.tolist() == [list(each) for each in zip(*targets[:2], strict=True)]


@pytest.mark.parametrize(("sides", "overflow"), [(1, "truncate"), (1, "drop"), (2, "truncate_prompt"), (2, "drop")])
def test_a_survey_counts_what_lands_of_chats(tmp_path, sides, overflow):
    chats = random_chats(60, sides, 64, seed=3)
    corpus = write_chats(tmp_path, [chats], 7)
    sequence = SequenceConfig(length=24, overflow=overflow)
    (found,) = survey(corpus, corpus.source_borders, sequence, 0.3, SMALL_BLOCKS.block_tokens)
    trained = joined(in_order(corpus, found.blocks, 0.3, "a", SMALL_BLOCKS, 0)).document
    parts = [part for document in trained for part in landed(chats[document], 24, overflow)]
    assert found.available == sum(len(part.side.tokens) for part in parts)
    assert 0 < len(parts) < sides * len(trained)


def test_the_order_depends_on_seed_name_and_epoch_only():
    lengths = np.full(100, 7, np.uint32)
    first = epoch_of(lengths, "a", 0).document.tolist()
    others = [("b", 0, SMALL_BLOCKS), ("a", 1, SMALL_BLOCKS), ("a", 0, Shuffling(43, 4 * LIGHTEST, 16 * LIGHTEST))]
    assert all(first != epoch_of(lengths, *other).document.tolist() for other in others)


def test_a_large_source_is_read_group_by_group():
    """Every 16 documents of the order come from 4 blocks of 4, whatever the source's size."""
    found = epoch_of(np.full(1600, 5)).document.reshape(-1, 16)
    blocks = np.sort(found // 4, axis=1)
    np.testing.assert_array_equal(blocks, blocks[:, ::4].repeat(4, axis=1))
    assert len(np.unique(blocks)) == 400
    assert np.ptp(blocks, axis=1).min() > 4  # the blocks of a group are no neighbours
    assert np.any(np.diff(found // 4, axis=1), axis=1).all()  # and their documents are mixed


def test_no_more_than_a_group_is_read_ahead():
    corpus, (source,) = sources_of({"a": (np.full(1600, 5), {})}, SMALL_BLOCKS)
    taken = 0
    for piece in source.in_order(0):
        assert corpus.read == taken + 16
        taken += len(piece.document)
    assert corpus.read == taken == 1600


def test_a_source_of_one_group_is_shuffled_fully():
    """Over many seeds, every document comes to every place equally often."""
    counts = np.zeros((16, 16))
    for seed in range(2000):
        shuffling = Shuffling(seed, SMALL_BLOCKS.block_tokens, SMALL_BLOCKS.group_tokens)
        counts[np.arange(16), epoch_of(np.full(16, 9), shuffling=shuffling).document] += 1
    chi_squared = ((counts - 125) ** 2 / 125).sum()
    assert abs(chi_squared - 225) < 5 * np.sqrt(2 * 225)  # 15 x 15 degrees of freedom


def test_a_document_larger_than_a_group_stays_whole_in_the_order():
    lengths = [10, 50_000, 10, 10, 30_000, 1]
    assert sorted(epoch_of(lengths).document) == list(range(6))


def test_two_level_order_stays_the_same_from_release_to_release():
    order = epoch_of(np.full(24, 25), "web", 1).document.tolist()
    assert order == [14, 11, 10, 20, 3, 0, 13, 12, 15, 23, 8, 21, 2, 1, 22, 9, 4, 19, 18, 16, 7, 6, 17, 5]


@given(
    st.lists(lengths_of_a_source, min_size=1, max_size=3), st.sampled_from([0.1, 0.6]), st.sampled_from([1, 5, 1000])
)
def test_held_out_documents_come_in_store_order(sources, fraction, piece):
    lengths = np.array(list(chain(*sources)))
    text_hashes = hashes(len(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PIECE", piece)
        pieces = list(held_out_in_order(Arrays(lengths, text_hashes), len(lengths), fraction))
    kept = np.flatnonzero(held_out(text_hashes, fraction))
    assert all(len(part.document) for part in pieces)
    if kept.size:
        found = joined(pieces)
        assert found.document.tolist() == kept.tolist()
        assert found.length.tolist() == lengths[kept].tolist()
        assert found.address.tolist() == (np.cumsum(lengths) - lengths)[kept].tolist()
