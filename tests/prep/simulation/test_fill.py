"""The fill that is foreseen against rows that were really packed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep.config import MixConfig
from llmt_prep.packing import pack
from llmt_prep.simulation.fill import Fill, draw, pack_drawn
from llmt_prep.simulation.tokenize_trial import Documents

CAPACITY = 1024


def mix(**changes: object) -> MixConfig:
    return MixConfig.model_validate(
        {"output": "o", "tokenizer": "t", "sequence": {"length": CAPACITY}, "sources": {"a": {"path": "p"}}} | changes
    )


def of_lengths(lengths: np.ndarray) -> Documents:
    count = len(lengths)
    return Documents(lengths.astype(np.int64), np.zeros((count, 2), np.uint32), np.zeros(count, np.int64))


def web_like(count: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).lognormal(5.5, 1.1, count) + 1).astype(np.int64)


@given(st.integers(1, 50), st.integers(0, 400), st.integers(0, 400))
def test_a_draw_takes_all_before_one_again(size: int, start: int, count: int) -> None:
    drawn = np.concatenate([draw(size, 0, start, (1,)), draw(size, start, start + count, (1,))])
    counts = Counter(drawn.tolist())
    times = [counts[number] for number in range(size)]
    assert sum(times) == start + count
    # in the middle of one call whole turns need no order, so both ends of it are turns of their own
    assert max(times) - min(times) <= 1


def test_of_all_documents_it_is_exactly_what_packing_makes() -> None:
    lengths = web_like(5000, seed=1)
    fill = pack_drawn(mix(), [of_lengths(lengths)], [5000.0])
    rows = len(pack(lengths, CAPACITY, "split").offsets) - 1
    assert fill.rows_for(int(lengths.sum()), CAPACITY) == rows


@pytest.mark.parametrize("window", [1000, 20_000])
@pytest.mark.parametrize("overflow", ["split", "truncate", "drop"])
def test_a_small_sample_foresees_the_rows_of_a_large_corpus(window: int, overflow: str) -> None:
    """Another draw of lengths from the same web-like distribution, 100 times as many, really packed."""
    corpus, sample = web_like(400_000, seed=2), web_like(4000, seed=3)
    packed = pack(corpus, CAPACITY, overflow, window=window)
    tokens, rows = int(packed.items.length.sum()), len(packed.offsets) - 1
    said = mix(sequence={"length": CAPACITY, "overflow": overflow}, packing={"window": window})
    fill = pack_drawn(said, [of_lengths(sample)], [400_000.0])
    assert fill.rows_for(tokens, CAPACITY) == pytest.approx(rows, rel=5e-4)


def test_bad_company_is_foreseen_too() -> None:
    """Documents of 0.6 rows never share one: a fill of 60 % must not be taken for a tail."""
    lengths = np.full(500, round(0.6 * CAPACITY))
    fill = pack_drawn(mix(packing={"window": 2000}), [of_lengths(lengths)], [200_000.0])
    tokens = 200_000 * round(0.6 * CAPACITY)
    assert fill.rows_for(tokens, CAPACITY) == pytest.approx(200_000, rel=0.01)


def test_sources_are_mixed_as_they_are_selected() -> None:
    """Documents of 0.7 rows are full rows only with those of 0.3."""
    long, short = np.full(50, round(0.7 * CAPACITY)), np.full(50, round(0.3 * CAPACITY))
    samples = [of_lengths(long), of_lengths(short)]
    said = mix(packing={"window": 2000})
    together, apart = pack_drawn(said, samples, [1e5, 1e5]), pack_drawn(said, samples, [1e5, 0.0])
    assert together.rows_for(10**8, CAPACITY) < 1.01 * 10**8 / CAPACITY
    assert apart.rows_for(10**8, CAPACITY) > 1.4 * 10**8 / CAPACITY


@given(
    st.integers(1, 10**6), st.floats(0.3, 1), st.integers(0, 100), st.floats(0.1, 1),
    st.integers(0, 10**5) | st.integers(0, 10**15), st.integers(0, 10**5) | st.integers(0, 10**12),
)  # fmt: skip
def test_more_tokens_never_need_fewer_rows(
    rows: int, fill: float, last: int, last_fill: float, tokens: int, more: int
) -> None:
    packed = Fill(0, rows, max(1, int(rows * fill * CAPACITY)), last, int(last * last_fill * CAPACITY), True)
    assert packed.rows_for(tokens, CAPACITY) <= packed.rows_for(tokens + more, CAPACITY)
    assert packed.rows_for(tokens, CAPACITY) * CAPACITY >= tokens
