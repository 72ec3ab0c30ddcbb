"""The order is a permutation, the same everywhere, different for every seed and epoch, and uniform."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmt_shared import order

seeds = st.integers(0, 2**63 - 1)
order_mix = order.mix


@given(seeds, st.integers(0, 1000), st.integers(1, 3000))
def test_an_epoch_is_a_permutation(seed, epoch, n):
    assert sorted(order.rows(seed, epoch, 0, n, n).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [order.SMALL, order.SMALL + 1, 131_072, 131_073, 200_003])
def test_an_epoch_is_a_permutation_on_both_sides_of_the_border(n):
    assert np.array_equal(np.sort(order.rows(7, 1, 0, n, n)), np.arange(n))


@given(seeds, st.integers(1, 500), st.data())
@example(0, 1, None)
def test_a_part_is_a_part_of_the_whole(seed, n, data):
    first = data.draw(st.integers(0, n)) if data else 0
    count = data.draw(st.integers(0, n - first)) if data else 1
    whole = order.rows(seed, 3, 0, n, n)
    assert np.array_equal(order.rows(seed, 3, first, count, n), whole[first : first + count])


def test_a_part_is_a_part_of_the_whole_for_many_rows():
    n = 300_000
    whole = order.rows(7, 0, 0, n, n)
    assert np.array_equal(order.rows(7, 0, 123_456, 1000, n), whole[123_456:124_456])


def test_rows_far_apart_need_no_table():
    n = 10**12
    places = order.rows(1, 0, n - 5, 5, n)
    assert len(set(places.tolist())) == 5
    assert ((places >= 0) & (places < n)).all()


@pytest.mark.parametrize("n", [100, 100_000])
def test_epochs_and_seeds_have_their_own_orders(n):
    orders = [order.rows(seed, epoch, 0, 100, n).tolist() for seed in (1, 2) for epoch in (0, 1)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))


@given(seeds, st.integers(1, 40), st.integers(0, 200), st.integers(0, 100))
def test_endless_rows_are_the_epochs_one_after_another(seed, n, first, count):
    epochs = range((first + count) // n + 1)
    endless = np.concatenate([order.rows(seed, epoch, 0, n, n) for epoch in epochs])
    assert np.array_equal(order.endless_rows(seed, first, count, n), endless[first : first + count])


def test_the_order_never_changes():
    """Resuming a run with a newer version of this package must give the same rows."""
    assert order.rows(42, 0, 0, 8, 8).tolist() == SMALL_ORDER
    assert order.rows(42, 3, 0, 5, 1_000_000).tolist() == LARGE_ORDER
    assert order.key(1, 2, 3) == KEY


SMALL_ORDER = [2, 5, 7, 6, 4, 1, 0, 3]
BLOCK_ORDER = [10, 5, 4, 3, 9, 11, 7, 8, 1, 0, 6, 2]
LARGE_ORDER = [172284, 214378, 289441, 832659, 868808]
KEY = 15020427595393229491


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_permutation_of_few_rows_is_equally_likely(n):
    """Chi-square over all n! orders of 6000 seeds; the limit is passed by chance once in 10^6 runs."""
    samples = 6000
    counts = Counter(tuple(order.rows(seed, 0, 0, n, n).tolist()) for seed in range(samples))
    permutations = list(itertools.permutations(range(n)))
    expected = samples / len(permutations)
    chi_square = sum((counts[each] - expected) ** 2 / expected for each in permutations)
    assert chi_square < {2: 24, 3: 36, 4: 75}[n]


@pytest.mark.parametrize("n", [5, 16, 70_000])
def test_every_row_comes_first_equally_often(n):
    """Chi-square over 16 equal groups of rows; the limit is passed by chance once in 10^6 runs."""
    groups, samples = min(n, 16), 4000
    counts = np.bincount([int(order.rows(seed, 0, 0, 1, n)[0]) * groups // n for seed in range(samples)], minlength=16)
    shares = np.bincount(np.arange(n) * groups // n, minlength=16) / n
    expected = shares[:groups] * samples
    assert ((counts[:groups] - expected) ** 2 / expected).sum() < {5: 36, 16: 59}.get(groups, 59)


def test_neighbours_in_a_large_order_are_far_apart():
    """The mean step of a uniform order of n rows is n / 3."""
    n = 1_000_000
    steps = np.abs(np.diff(order.rows(5, 0, 0, 20_000, n)))
    assert abs(steps.mean() / n - 1 / 3) < 0.01


def test_every_part_of_a_key_matters_and_so_does_its_order():
    keys = [order.key(*parts) for parts in ((), (0,), (0, 0), (1, 0), (0, 1), (1,), (2**63,), (-1,))]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("first", "count", "n"), [(0, 6, 5), (-1, 2, 5), (5, 1, 5), (3, -1, 5)])
def test_places_outside_the_epoch_are_refused(first, count, n):
    with pytest.raises(ValueError, match="of an epoch of 5 rows"):
        order.rows(0, 0, first, count, n)


def test_no_rows_have_no_endless_order():
    with pytest.raises(ValueError, match="no rows"):
        order.endless_rows(0, 0, 1, 0)


def test_what_a_caller_does_to_an_order_does_not_change_it():
    order.rows(9, 9, 0, 10, 10)[:] = 0
    assert sorted(order.rows(9, 9, 0, 10, 10).tolist()) == list(range(10))


@given(seeds, st.integers(0, 3000), st.booleans())
def test_shuffled_is_the_stable_order_of_mixed_numbers(seed, n, has_ties):
    """Also where many numbers agree in their high bits or in all."""
    mix = (lambda x: order_mix(x) & np.uint64(0xFFF << 52 | 1)) if has_ties else order_mix
    with pytest.MonkeyPatch.context() as patch:
        key = order.key(seed)
        patch.setattr(order, "mix", mix)
        patch.setattr(order, "key", lambda *parts: key)
        numbers = mix(np.arange(n, dtype=np.uint64) + np.uint64(key))
        assert order.shuffled(n, seed).tolist() == np.argsort(numbers, kind="stable").tolist()


block_sizes = st.builds(order.Blocks, rows_per_shard=st.integers(1, 40), shards=st.integers(1, 9))


@given(seeds, st.integers(0, 50), st.integers(1, 700), block_sizes)
def test_an_epoch_in_blocks_is_a_permutation(seed, epoch, n, blocks):
    assert sorted(order.rows(seed, epoch, 0, n, n, blocks).tolist()) == list(range(n))


@given(seeds, st.integers(1, 700), block_sizes, st.data())
def test_a_part_of_an_epoch_in_blocks_is_a_part_of_the_whole(seed, n, blocks, data):
    first = data.draw(st.integers(0, n))
    count = data.draw(st.integers(0, n - first))
    whole = order.rows(seed, 1, 0, n, n, blocks)
    assert np.array_equal(order.rows(seed, 1, first, count, n, blocks), whole[first : first + count])


@given(seeds, st.integers(1, 700), block_sizes)
def test_a_block_holds_all_rows_of_its_shards_and_no_others(seed, n, blocks):
    whole, place, seen = order.rows(seed, 2, 0, n, n, blocks), 0, []
    while place < n:
        block = order.block_at(seed, 2, place, n, blocks)
        assert block.first == place
        assert len(block.shards) == min(blocks.shards, blocks.num_shards(n) - len(seen))
        wanted = [row for row in range(n) if row // blocks.rows_per_shard in set(block.shards.tolist())]
        assert sorted(whole[block.first : block.stop].tolist()) == wanted
        place = block.stop
        seen += block.shards.tolist()
    assert sorted(seen) == list(range(blocks.num_shards(n)))


@given(seeds, st.integers(1, 300), st.integers(1, 40))
def test_one_block_of_all_shards_is_the_order_without_blocks(seed, n, rows_per_shard):
    blocks = order.Blocks(rows_per_shard, -(-n // rows_per_shard))
    assert np.array_equal(order.rows(seed, 0, 0, n, n, blocks), order.rows(seed, 0, 0, n, n))


@given(seeds, st.integers(1, 40), st.integers(0, 200), st.integers(0, 100), block_sizes)
def test_endless_rows_in_blocks_are_the_epochs_one_after_another(seed, n, first, count, blocks):
    epochs = range((first + count) // n + 1)
    endless = np.concatenate([order.rows(seed, epoch, 0, n, n, blocks) for epoch in epochs])
    assert np.array_equal(order.endless_rows(seed, first, count, n, blocks), endless[first : first + count])


def test_shards_rows_and_epochs_in_blocks_have_their_own_orders():
    blocks, n = order.Blocks(50, 2), 1000
    firsts = [order.block_at(seed, epoch, 0, n, blocks).shards.tolist() for seed in range(6) for epoch in range(6)]
    assert len(set(map(tuple, firsts))) > 30
    one = order.block_at(0, 0, 0, n, blocks)
    inside = [order.rows(0, 0, place, 100, n, blocks) % 50 for place in (0, 100)]
    assert not np.array_equal(*inside)
    assert one.stop == 100


def test_blocks_of_a_trillion_rows_need_no_table_of_rows():
    blocks, n = order.Blocks(1 << 20, 16), 10**12
    places = order.rows(1, 0, n - 5, 5, n, blocks)
    assert len(set(places.tolist())) == 5
    assert ((places >= 0) & (places < n)).all()


def test_the_order_in_blocks_does_not_change_between_versions():
    assert order.rows(42, 0, 0, 12, 12, order.Blocks(3, 2)).tolist() == BLOCK_ORDER
