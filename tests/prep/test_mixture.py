from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep.mixture import Mixture, Shuffling, Source, document_order, held_out, plan, windows
from llmt_shared.errors import ConfigError, DataError

SHUFFLING = Shuffling(seed=42)
SMALL_BLOCKS = Shuffling(seed=42, block_tokens=50, group_tokens=200)


def source(name, lengths, **amount):
    lengths = np.array(lengths, np.int64)
    return Source(name, lengths, lengths, **amount)


def of_tokens(name, size, /, **amount):
    """A source of one-token documents, whose amounts can be met exactly."""
    return source(name, np.ones(size), **amount)


def got(mixture):
    return [selection.got for selection in mixture.selections]


lengths_of_a_source = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)


@st.composite
def mixtures(draw):
    """Sources with an epochs or a tokens amount each, and their plan."""
    sources = []
    for number in range(draw(st.integers(1, 4))):
        lengths = draw(lengths_of_a_source)
        amount = draw(
            st.sampled_from([{}, {"epochs": 0.5}, {"epochs": 1.3}, {"epochs": 3}])
            | st.integers(1, 2 * sum(lengths)).map(lambda tokens: {"tokens": tokens})
        )
        sources.append(source(f"s{number}", lengths, **amount))
    shuffling = draw(st.sampled_from([SHUFFLING, SMALL_BLOCKS]))
    return sources, plan(sources, None, shuffling, max_epochs=2), shuffling


def test_a_source_that_says_nothing_is_taken_once():
    mixture = plan([source("a", [5, 0, 7])], None, SHUFFLING)
    assert mixture == Mixture(12, mixture.selections)
    assert mixture.selections[0].epochs == 1
    assert mixture.selections[0].selected == 3


@pytest.mark.parametrize(("epochs", "tokens"), [(0.5, 50), (1, 100), (2.5, 250), (3, 300), (0.3, 30), (1.1, 110)])
def test_epochs_are_met_exactly_where_documents_allow(epochs, tokens):
    selection = plan([of_tokens("a", 100, epochs=epochs)], None, SHUFFLING).selections[0]
    assert (selection.wanted, selection.got) == (tokens, tokens)
    assert selection.whole_epochs == int(epochs)
    assert selection.extra_documents == tokens % 100
    assert selection.epochs == epochs


def test_epochs_may_exceed_max_epochs():
    assert got(plan([of_tokens("a", 10, epochs=4)], None, SHUFFLING, max_epochs=1)) == [40]


def test_weighted_sources_share_what_the_others_leave():
    sources = [
        of_tokens("web", 1000, weight=6),
        of_tokens("code", 1000, weight=2),
        of_tokens("math", 50, epochs=2),
        of_tokens("wiki", 500, tokens=300),
    ]
    mixture = plan(sources, 800, SHUFFLING)
    assert got(mixture) == [300, 100, 100, 300]
    assert mixture.budget == 800


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 30)), min_size=1, max_size=4),
    st.sampled_from([1, 1.5, 2.35]),
)
def test_max_is_the_largest_budget_that_is_feasible(parts, max_epochs):
    sources = [of_tokens(f"s{i}", tokens, weight=weight / 10) for i, (tokens, weight) in enumerate(parts)]
    sources.append(of_tokens("fixed", 10, epochs=2))
    mixture = plan(sources, "max", SHUFFLING, max_epochs)
    assert plan(sources, mixture.budget, SHUFFLING, max_epochs) == mixture
    assert all(selection.epochs <= max_epochs for selection in mixture.selections[:-1])
    with pytest.raises(ConfigError, match=f"largest feasible budget is {mixture.budget:,} "):
        plan(sources, mixture.budget + 1, SHUFFLING, max_epochs)


def test_max_without_weights_is_what_the_sources_take():
    assert plan([of_tokens("a", 10, epochs=2)], "max", SHUFFLING).budget == 20


@given(lengths_of_a_source, lengths_of_a_source, st.integers(1, 9), st.floats(0.05, 1))
def test_shares_are_right_within_half_a_document(first, second, weight, part):
    sources = [source("a", first, weight=weight), source("b", second, weight=1.5)]
    largest = plan(sources, "max", SHUFFLING, 2).budget
    budget = max(1, int(largest * part))
    for selection, lengths, share in zip(
        plan(sources, budget, SHUFFLING, 2).selections, (first, second), (weight, 1.5), strict=True
    ):
        assert abs(selection.wanted - budget * share / (weight + 1.5)) <= 1
        if selection.got > max(lengths):  # else the one document that every source gives
            assert abs(selection.got - selection.wanted) <= max(lengths) / 2


def test_the_cut_is_at_the_nearest_document():
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    mine = source("a", lengths)
    ends = np.cumsum(lengths[document_order(lengths, "a", 0, SHUFFLING)])
    for wanted in range(int(ends[0]), int(ends[-1]), 7):
        selection = plan([source("a", lengths, tokens=wanted)], None, SHUFFLING).selections[0]
        assert abs(selection.got - wanted) == np.abs(ends - wanted).min()
        assert selection.got in ends.tolist()
    assert plan([mine], None, SHUFFLING).selections[0].got == ends[-1]


def test_a_source_never_gives_nothing():
    selection = plan([source("a", [0, 1000, 0, 1000], tokens=1)], None, SHUFFLING).selections[0]
    assert (selection.wanted, selection.got) == (1, 1000)


def test_tokens_are_those_that_land_in_rows():
    truncated = Source("a", np.array([100, 3]), np.array([8, 3]), epochs=2)
    assert got(plan([truncated], None, SHUFFLING)) == [22]


def test_a_source_that_cannot_reach_its_share_stops_the_plan():
    sources = [of_tokens("web", 5000, weight=3), of_tokens("code", 1000, weight=1), of_tokens("math", 100, epochs=1)]
    message = (
        r"sources\.code\.weight: its share of budget 10,100 wants 2,500 of 1,000 available tokens, which is "
        r"2\.5 epochs; max_epochs is 1; the largest feasible budget is 4,100 "
    )
    with pytest.raises(ConfigError, match=message):
        plan(sources, 10_100, SHUFFLING)
    assert got(plan(sources, 10_100, SHUFFLING, max_epochs=2.5)) == [7500, 2500, 100]


def test_tokens_beyond_max_epochs_stop_the_plan():
    with pytest.raises(
        ConfigError, match=r"sources\.a\.tokens: wants 31 of 20 .* 1\.55 epochs; max_epochs 1\.5 allows 30"
    ):
        plan([of_tokens("a", 20, tokens=31)], None, SHUFFLING, max_epochs=1.5)


def test_a_weight_without_a_budget_is_refused():
    with pytest.raises(ConfigError, match=r"sources\.b\.weight: .*set `budget`"):
        plan([of_tokens("a", 9), of_tokens("b", 9, weight=1)], None, SHUFFLING)


@pytest.mark.parametrize("budget", [5, 10])
def test_a_budget_that_the_fixed_sources_use_up_is_refused(budget):
    with pytest.raises(ConfigError, match=rf"budget: {budget} leaves nothing .* take 10; set it above that, up to 19"):
        plan([of_tokens("a", 10), of_tokens("b", 9, weight=1)], budget, SHUFFLING)


@pytest.mark.parametrize("budget", [9, 11])
def test_a_budget_that_no_weight_can_fill_is_refused(budget):
    with pytest.raises(ConfigError, match=f"budget: {budget} tokens, but .* take 10 and none has a weight"):
        plan([of_tokens("a", 10)], budget, SHUFFLING)
    assert plan([of_tokens("a", 10)], 10, SHUFFLING).budget == 10


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({"weight": 1, "epochs": 2}, "weight and epochs exclude each other"),
        ({"weight": 0}, r"sources\.a\.weight: 0 is not a number above 0"),
        ({"epochs": -1.0}, r"sources\.a\.epochs: -1\.0 is not a number above 0"),
        ({"epochs": float("nan")}, r"sources\.a\.epochs: nan is not a number above 0"),
        ({"tokens": 0}, r"sources\.a\.tokens: 0 is not a number above 0"),
    ],
)
def test_senseless_amounts_are_refused(amounts, message):
    with pytest.raises(ConfigError, match=message):
        plan([of_tokens("a", 10, **amounts)], "max", SHUFFLING)


@pytest.mark.parametrize(("budget", "max_epochs", "name"), [(0, 1, "budget"), (-4, 1, "budget"), (5, 0, "max_epochs")])
def test_senseless_limits_are_refused(budget, max_epochs, name):
    with pytest.raises(ConfigError, match=f"^{name}: "):
        plan([of_tokens("a", 10, weight=1)], budget, SHUFFLING, max_epochs)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_source_with_nothing_for_the_rows_is_named(lengths):
    with pytest.raises(DataError, match=rf"sources\.empty: none of its {len(lengths)} documents"):
        plan([of_tokens("a", 10), source("empty", lengths)], None, SHUFFLING)


@given(lengths_of_a_source, st.integers(0, 3), st.sampled_from([SHUFFLING, SMALL_BLOCKS]))
def test_an_order_holds_every_document_once(lengths, epoch, shuffling):
    assert sorted(document_order(np.array(lengths), "a", epoch, shuffling)) == list(range(len(lengths)))


def test_the_order_depends_on_seed_name_and_epoch_only():
    lengths = np.full(100, 7, np.uint32)
    first = document_order(lengths, "a", 0, SMALL_BLOCKS).tolist()
    assert first == document_order(lengths.astype(np.int64), "a", 0, SMALL_BLOCKS).tolist()
    others = [("b", 0, SMALL_BLOCKS), ("a", 1, SMALL_BLOCKS), ("a", 0, Shuffling(43, 50, 200))]
    assert all(first != document_order(lengths, *other).tolist() for other in others)


def test_a_large_source_is_read_group_by_group():
    """Every 200 tokens of the order come from 4 blocks of 50 tokens, whatever the source's size."""
    lengths = np.full(2000, 5)
    order = document_order(lengths, "a", 0, SMALL_BLOCKS).reshape(-1, 40)
    blocks = np.sort(order // 10, axis=1)
    np.testing.assert_array_equal(blocks, blocks[:, ::10].repeat(10, axis=1))
    assert len(np.unique(blocks)) == 200
    assert np.ptp(blocks, axis=1).min() > 4  # the blocks of a group are no neighbours
    assert np.any(np.diff(order // 10, axis=1), axis=1).all()  # and their documents are mixed


def test_a_document_larger_than_a_block_stays_whole_in_the_order():
    lengths = np.array([10, 500, 10, 10, 300, 1])
    assert sorted(document_order(lengths, "a", 0, SMALL_BLOCKS)) == list(range(6))


def test_two_level_order_stays_the_same_from_release_to_release():
    lengths = np.full(24, 25)
    order = document_order(lengths, "web", 1, SMALL_BLOCKS).tolist()
    assert order == [10, 1, 16, 7, 11, 0, 17, 6, 4, 13, 12, 18, 21, 20, 19, 5, 15, 9, 3, 14, 23, 2, 22, 8]


@given(mixtures(), st.integers(1, 70))
def test_windows_cover_what_is_selected_epoch_after_epoch(case, window_documents):
    sources, mixture, shuffling = case
    chosen = [[] for _ in sources]
    for window in windows(sources, mixture, shuffling, window_documents):
        for number, document in zip(window.source.tolist(), window.document.tolist(), strict=True):
            chosen[number].append(document)
    for mine, selection, documents in zip(sources, mixture.selections, chosen, strict=True):
        size = len(mine.lengths)
        for epoch in range(selection.whole_epochs):
            assert sorted(documents[epoch * size : (epoch + 1) * size]) == list(range(size))
        extra = documents[selection.whole_epochs * size :]
        assert len(extra) == len(set(extra)) == selection.extra_documents
        assert len(documents) == selection.selected
        assert int(mine.landing[documents].sum()) == selection.got


@given(mixtures(), st.integers(1, 70))
def test_windows_hold_as_many_documents_as_asked(case, window_documents):
    sizes = [len(window.document) for window in windows(*case, window_documents)]
    assert all(size == window_documents for size in sizes[:-1])
    assert 0 < sizes[-1] <= window_documents


@given(mixtures(), st.integers(1, 70))
def test_every_window_mixes_the_sources_in_proportion(case, window_documents):
    sources, mixture, _ = case
    tokens = np.zeros(len(sources))
    within = [mine.landing.max() / own.got for mine, own in zip(sources, mixture.selections, strict=True)]
    for window in windows(*case, window_documents):
        for number, mine in enumerate(sources):
            tokens[number] += mine.landing[window.document[window.source == number]].sum()
        shares = tokens / got(mixture)
        for i in range(len(sources)):
            for j in range(i):
                assert abs(shares[i] - shares[j]) <= (within[i] + within[j]) / 2 + 1e-9
    np.testing.assert_array_equal(tokens, got(mixture))


@given(mixtures(), st.integers(1, 70))
def test_the_sequence_of_documents_does_not_depend_on_the_window(case, window_documents):
    pieces, whole = list(windows(*case, window_documents)), list(windows(*case, 10**6))
    for column in range(2):
        np.testing.assert_array_equal(np.concatenate([piece[column] for piece in pieces]), whole[0][column])


def test_another_source_does_not_change_which_documents_are_selected():
    mine, other = source("a", range(1, 50), tokens=300), source("b", range(1, 50))
    alone = next(windows([mine], plan([mine], None, SHUFFLING), SHUFFLING, 10**6))
    both = next(windows([other, mine], plan([other, mine], None, SHUFFLING), SHUFFLING, 10**6))
    assert both.document[both.source == 1].tolist() == alone.document.tolist()


def test_windows_are_made_one_at_a_time():
    sources = [of_tokens("a", 1000, epochs=10**9)]
    stream = windows(sources, plan(sources, None, SHUFFLING), SHUFFLING, 5000)
    assert Counter(next(stream).document.tolist()) == dict.fromkeys(range(1000), 5)


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
