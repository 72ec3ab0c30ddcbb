"""Windows hold what is selected, epoch after epoch, with the sources mixed in proportion, and read no further."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_corpus import LONG_ROWS, SHUFFLING, SMALL_BLOCKS, of_lengths, sources_of

from llmt_prep import order
from llmt_prep.config import SequenceConfig
from llmt_prep.mixture import plan
from llmt_prep.windows import in_windows, windows

lengths_of_a_source = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)


class Case:
    """Some sources, the corpus that they are in, and the plan over them."""

    def __init__(self, parts, shuffling=SHUFFLING, sequence=LONG_ROWS):
        self.corpus, self.sources = sources_of(parts, shuffling, sequence)
        self.borders = np.cumsum([0, *(len(lengths) for lengths, _ in parts.values())])
        self.mixture = plan(self.sources, None, max_epochs=2)

    def windows(self, size):
        return windows(self.sources, self.mixture, size)

    def source(self, window):
        return np.searchsorted(self.borders, window.document, "right") - 1

    def landing(self, documents):
        return self.sources[0].landing(of_lengths(self.corpus.all_lengths[documents]))


@st.composite
def cases(draw):
    """Sources with an epochs or a tokens amount each, some of their documents cut or dropped."""
    parts = {}
    for number in range(draw(st.integers(1, 4))):
        lengths = draw(lengths_of_a_source.filter(lambda lengths: min(lengths) <= 30 and any(lengths)))
        amount = draw(st.sampled_from([{}, {"epochs": 0.5}, {"epochs": 1.3}, {"epochs": 3}, {"tokens": 1}]))
        parts[f"s{number}"] = ([*lengths, 7], amount)
    sequence = draw(st.sampled_from([LONG_ROWS, SequenceConfig(length=30, overflow="drop")]))
    return Case(parts, draw(st.sampled_from([SHUFFLING, SMALL_BLOCKS])), sequence)


@given(cases(), st.integers(1, 70))
def test_windows_cover_what_is_selected_epoch_after_epoch(case, size):
    found = list(case.windows(size))
    for number, selection in enumerate(case.mixture.selections):
        first, last = case.borders[number : number + 2].tolist()
        mine = np.concatenate([window.document[case.source(window) == number] for window in found]).tolist()
        count = last - first
        for epoch in range(selection.whole_epochs):
            assert sorted(mine[epoch * count : (epoch + 1) * count]) == list(range(first, last))
        extra = mine[selection.whole_epochs * count :]
        assert len(extra) == len(set(extra)) == selection.extra_documents
        assert len(mine) == selection.selected
        assert int(case.landing(mine).sum()) == selection.got


@given(cases(), st.integers(1, 70))
def test_windows_say_length_and_address_of_their_documents(case, size):
    addresses = np.cumsum(case.corpus.all_lengths) - case.corpus.all_lengths
    for window in case.windows(size):
        assert window.length.tolist() == case.corpus.all_lengths[window.document].tolist()
        assert window.address.tolist() == addresses[window.document].tolist()


@given(cases(), st.integers(1, 70))
def test_windows_hold_as_many_documents_as_asked(case, size):
    sizes = [len(window.document) for window in case.windows(size)]
    assert all(found == size for found in sizes[:-1])
    assert 0 < sizes[-1] <= size


@given(cases(), st.integers(1, 70))
def test_every_window_mixes_the_sources_in_proportion(case, size):
    got = [selection.got for selection in case.mixture.selections]
    tokens = np.zeros(len(got))
    longest = [case.landing(np.arange(a, b)).max() for a, b in zip(case.borders, case.borders[1:], strict=False)]
    within = np.array(longest) / got
    for window in case.windows(size):
        tokens += np.bincount(case.source(window), case.landing(window.document), len(got))
        shares = tokens / got
        for i in range(len(got)):
            for j in range(i):
                assert abs(shares[i] - shares[j]) <= (within[i] + within[j]) / 2 + 1e-9
    np.testing.assert_array_equal(tokens, got)


@given(cases())
def test_documents_are_merged_by_place_and_then_by_source(case):
    """A plain sort of all selected documents by the share of their source's tokens before their middle."""
    expected = []
    for number, (source, selection) in enumerate(zip(case.sources, case.mixture.selections, strict=True)):
        epochs = range(selection.whole_epochs + 1)
        pieces = [piece.document for epoch in epochs for piece in source.in_order(epoch)]
        documents = np.concatenate(pieces)[: selection.selected]
        lands = case.landing(documents)
        middle = 2 * np.cumsum(lands) - lands
        expected += [
            (place, number, turn, document)
            for turn, (place, document) in enumerate(zip(middle / (2 * selection.got), documents, strict=True))
        ]
    (whole,) = case.windows(10**6)
    assert whole.document.tolist() == [document for *_, document in sorted(expected)]


@given(cases(), st.integers(1, 70), st.integers(1, 9))
def test_the_sequence_of_documents_depends_neither_on_the_window_nor_on_pieces(case, size, piece):
    (whole,) = case.windows(10**6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PIECE", piece)
        found = list(case.windows(size))
    for column, wanted in zip(zip(*found, strict=True), whole, strict=True):
        np.testing.assert_array_equal(np.concatenate(column), wanted)


def test_another_source_does_not_change_which_documents_are_selected():
    lengths, amount = list(range(1, 50)), {"tokens": 300}
    (alone,) = Case({"a": (lengths, amount)}).windows(10**6)
    case = Case({"b": (lengths, {}), "a": (lengths, amount)})
    (both,) = case.windows(10**6)
    assert (both.document[case.source(both) == 1] - 49).tolist() == alone.document.tolist()


def test_windows_are_made_one_at_a_time():
    case = Case({"a": ([1] * 1000, {"epochs": 10**9})})
    assert Counter(next(case.windows(5000)).document.tolist()) == dict.fromkeys(range(1000), 5)


def test_no_source_is_read_further_than_one_group_ahead():
    """Also where one source's documents are so short that thousands of them are a small share."""
    case = Case({"short": ([1] * 40_000 + [10**6] * 3, {}), "even": ([5] * 800, {})}, SMALL_BLOCKS)
    taken, most = 0, 2 * 16 + 16  # a group of each; the documents of a group that wait for the window
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PIECE", 8)
        for window in case.windows(16):
            taken += len(window.document)
            assert case.corpus.read <= taken + most
    assert taken == case.corpus.read == 40_803


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 20))
def test_a_stream_is_cut_anew_into_windows(sizes, size):
    ends = np.cumsum(sizes)
    pieces = [of_lengths(np.ones(n, np.int64), np.arange(end - n, end)) for n, end in zip(sizes, ends, strict=True)]
    found = [window.document.tolist() for window in in_windows(iter(pieces), size)]
    whole = list(range(sum(sizes)))
    assert found == [whole[start : start + size] for start in range(0, len(whole), size)]
