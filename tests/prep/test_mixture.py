from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from synthetic_corpus import LONG_ROWS, SHUFFLING, SMALL_BLOCKS, of_lengths, sources_of

from llmt_prep import order
from llmt_prep.config import SequenceConfig
from llmt_prep.mixture import Mixture, plan
from llmt_shared.errors import ConfigError, DataError


def source(name, lengths, sequence=LONG_ROWS, shuffling=SHUFFLING, **amount):
    _, (only,) = sources_of({name: (lengths, amount)}, shuffling, sequence)
    return only


def of_tokens(name, size, /, **amount):
    """A source of one-token documents, whose amounts can be met exactly."""
    return source(name, np.ones(size), **amount)


def lengths_in_order(source, epoch):
    return np.concatenate([piece.length for piece in source.in_order(epoch)])


def got(mixture):
    return [selection.got for selection in mixture.selections]


lengths_of_a_source = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)


def test_a_source_that_says_nothing_is_taken_once():
    mixture = plan([source("a", [5, 0, 7])], None)
    assert mixture == Mixture(12, mixture.selections)
    assert mixture.selections[0].epochs == 1
    assert mixture.selections[0].selected == 3


@pytest.mark.parametrize(("epochs", "tokens"), [(0.5, 50), (1, 100), (2.5, 250), (3, 300), (0.3, 30), (1.1, 110)])
def test_epochs_are_met_exactly_where_documents_allow(epochs, tokens):
    selection = plan([of_tokens("a", 100, epochs=epochs)], None).selections[0]
    assert (selection.wanted, selection.got) == (tokens, tokens)
    assert selection.whole_epochs == int(epochs)
    assert selection.extra_documents == tokens % 100
    assert selection.epochs == epochs


def test_epochs_may_exceed_max_epochs():
    assert got(plan([of_tokens("a", 10, epochs=4)], None, max_epochs=1)) == [40]


def test_weighted_sources_share_what_the_others_leave():
    sources = [
        of_tokens("web", 1000, weight=6),
        of_tokens("code", 1000, weight=2),
        of_tokens("math", 50, epochs=2),
        of_tokens("wiki", 500, tokens=300),
    ]
    mixture = plan(sources, 800)
    assert got(mixture) == [300, 100, 100, 300]
    assert mixture.budget == 800


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 30)), min_size=1, max_size=4),
    st.sampled_from([1, 1.5, 2.35]),
)
def test_max_is_the_largest_budget_that_is_feasible(parts, max_epochs):
    sources = [of_tokens(f"s{i}", tokens, weight=weight / 10) for i, (tokens, weight) in enumerate(parts)]
    sources.append(of_tokens("fixed", 10, epochs=2))
    mixture = plan(sources, "max", max_epochs)
    assert plan(sources, mixture.budget, max_epochs) == mixture
    assert all(selection.epochs <= max_epochs for selection in mixture.selections[:-1])
    with pytest.raises(ConfigError, match=f"largest feasible budget is {mixture.budget:,} "):
        plan(sources, mixture.budget + 1, max_epochs)


def test_max_without_weights_is_what_the_sources_take():
    assert plan([of_tokens("a", 10, epochs=2)], "max").budget == 20


@given(lengths_of_a_source, lengths_of_a_source, st.integers(1, 9), st.floats(0.05, 1))
def test_shares_are_right_within_half_a_document(first, second, weight, part):
    sources = [source("a", first, weight=weight), source("b", second, weight=1.5)]
    largest = plan(sources, "max", 2).budget
    budget = max(1, int(largest * part))
    for selection, lengths, share in zip(
        plan(sources, budget, 2).selections, (first, second), (weight, 1.5), strict=True
    ):
        assert abs(selection.wanted - budget * share / (weight + 1.5)) <= 1
        if selection.got > max(lengths):  # else the one document that every source gives
            assert abs(selection.got - selection.wanted) <= max(lengths) / 2


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.sampled_from([SHUFFLING, SMALL_BLOCKS]),
    st.sampled_from(["truncate", "drop", "split"]),
    st.sampled_from([1, 6, 1000]),
    st.data(),
)
def test_the_cut_is_the_nearest_of_all_that_could_be_made(lengths, shuffling, overflow, piece, data):
    """The shorter of two that are equally near; with as many documents as come before the next token."""
    sequence = SequenceConfig(length=30, overflow=overflow)
    mine = source("a", lengths, sequence, shuffling)
    assume(mine.available)
    wanted = data.draw(st.integers(1, 3 * mine.available))
    epoch, rest = divmod(wanted, mine.available)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PIECE", piece)
        selection = plan([replace(mine, tokens=wanted)], None, max_epochs=3).selections[0]
    ends = np.cumsum(mine.landing(of_lengths(lengths_in_order(mine, epoch)))).tolist() if rest else []
    cuts = [tokens for tokens in [0, *ends] if tokens or epoch]  # something of the source is always selected
    nearest = min(cuts, key=lambda tokens: (abs(tokens - rest), tokens))
    assert selection.got == epoch * mine.available + nearest
    chosen = np.concatenate([lengths_in_order(mine, number) for number in range(epoch + 1)])[: selection.selected]
    assert mine.landing(of_lengths(chosen)).sum() == selection.got


def test_a_source_never_gives_nothing():
    selection = plan([source("a", [0, 1000, 0, 1000], tokens=1)], None).selections[0]
    assert (selection.wanted, selection.got) == (1, 1000)


def test_tokens_are_those_that_land_in_rows():
    truncated = source("a", [100, 3], SequenceConfig(length=8, overflow="truncate"), epochs=2)
    assert got(plan([truncated], None)) == [22]


def test_a_source_that_cannot_reach_its_share_stops_the_plan():
    sources = [of_tokens("web", 5000, weight=3), of_tokens("code", 1000, weight=1), of_tokens("math", 100, epochs=1)]
    message = (
        r"sources\.code\.weight: its share of budget 10,100 wants 2,500 of 1,000 available tokens, which is "
        r"2\.5 epochs; max_epochs is 1; the largest feasible budget is 4,100 "
    )
    with pytest.raises(ConfigError, match=message):
        plan(sources, 10_100)
    assert got(plan(sources, 10_100, max_epochs=2.5)) == [7500, 2500, 100]


def test_tokens_beyond_max_epochs_stop_the_plan():
    with pytest.raises(
        ConfigError, match=r"sources\.a\.tokens: wants 31 of 20 .* 1\.55 epochs; max_epochs 1\.5 allows 30"
    ):
        plan([of_tokens("a", 20, tokens=31)], None, max_epochs=1.5)


def test_a_weight_without_a_budget_is_refused():
    with pytest.raises(ConfigError, match=r"sources\.b\.weight: .*set `budget`"):
        plan([of_tokens("a", 9), of_tokens("b", 9, weight=1)], None)


@pytest.mark.parametrize("budget", [5, 10])
def test_a_budget_that_the_fixed_sources_use_up_is_refused(budget):
    with pytest.raises(ConfigError, match=rf"budget: {budget} leaves nothing .* take 10; set it above that, up to 19"):
        plan([of_tokens("a", 10), of_tokens("b", 9, weight=1)], budget)


@pytest.mark.parametrize("budget", [9, 11])
def test_a_budget_that_no_weight_can_fill_is_refused(budget):
    with pytest.raises(ConfigError, match=f"budget: {budget} tokens, but .* take 10 and none has a weight"):
        plan([of_tokens("a", 10)], budget)
    assert plan([of_tokens("a", 10)], 10).budget == 10


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
        plan([of_tokens("a", 10, **amounts)], "max")


@pytest.mark.parametrize(("budget", "max_epochs", "name"), [(0, 1, "budget"), (-4, 1, "budget"), (5, 0, "max_epochs")])
def test_senseless_limits_are_refused(budget, max_epochs, name):
    with pytest.raises(ConfigError, match=f"^{name}: "):
        plan([of_tokens("a", 10, weight=1)], budget, max_epochs)


@pytest.mark.parametrize(
    "amount", [{"epochs": 1e300}, {"epochs": 2.0**61 / 10}, {"tokens": 2**61}, {"weight": 1}], ids=str
)
def test_more_than_can_be_counted_is_refused(amount):
    with pytest.raises(ConfigError, match=r"sources\.a: more than 2\^60 tokens would be selected"):
        plan([of_tokens("b", 10), of_tokens("a", 10, **amount)], "max", max_epochs=1e300)


def test_more_documents_than_can_be_counted_are_refused():
    mine = source("a", [1] + [9] * 99, SequenceConfig(length=8, overflow="drop"), epochs=2.0**58)
    with pytest.raises(ConfigError, match=r"sources\.a: more than 2\^60 documents would be selected"):
        plan([mine], None)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_source_with_nothing_for_the_rows_is_named(lengths):
    with pytest.raises(DataError, match=rf"sources\.empty: none of its {len(lengths)} documents"):
        plan([of_tokens("a", 10), source("empty", lengths)], None)
