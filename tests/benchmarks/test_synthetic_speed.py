import itertools

import numpy as np
import pytest

from llmt_train.config import SyntheticConfig
from llmt_train.data.stream import count, read_batch
from llmt_train.data.synthetic import open_synthetic

NUM_ROWS = 1_000_000
KINDS = ("pretrain", "sft", "preference")


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_of_4096_tokens(benchmark, kind):
    split = open_synthetic(SyntheticConfig(length=4096, rows=NUM_ROWS), kind, 32_000).train
    rows = itertools.cycle(np.random.default_rng(0).integers(0, NUM_ROWS, (5000, 1)))

    def generate():
        row = next(rows)
        return split.tokens(row), split.segments(row), split.spans(row), split.pairs(row), split.targets(row)

    tokens, segments, *_ = benchmark(generate)
    fill = segments.length.sum() / tokens.size
    benchmark.extra_info["fill"] = fill
    assert fill >= 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_of_4_rows(benchmark, kind):
    split = open_synthetic(SyntheticConfig(length=4096, rows=NUM_ROWS), kind, 32_000).train
    rows = itertools.cycle(np.random.default_rng(0).integers(0, NUM_ROWS, (2000, 4)))

    def read():
        chosen = next(rows)
        return read_batch(split, chosen, count(split, chosen))

    assert benchmark(read).input_ids.shape == (1, 4 * 4096)
