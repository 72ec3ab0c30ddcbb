import numpy as np
import pytest

from llmt_prep.packing import best_fit_decreasing, pack


def web_like_lengths(num_documents, capacity):
    lengths = np.random.default_rng(0).lognormal(6, 1.2, num_documents).astype(np.int32) + 1
    return np.minimum(lengths, capacity)


@pytest.mark.parametrize("capacity", [4096, 32_768])
def test_one_pack_of_1m_documents(benchmark, capacity):
    lengths = web_like_lengths(1_000_000, capacity)
    rows = benchmark(best_fit_decreasing, lengths, capacity)
    rows_over_bound = (len(rows.offsets) - 1) / -(-lengths.sum() // capacity)
    benchmark.extra_info["rows_over_bound"] = rows_over_bound
    assert rows_over_bound <= 1.001


@pytest.mark.parametrize("window", [1000, 65_536])
def test_windows_over_1m_documents(benchmark, window):
    lengths = web_like_lengths(1_000_000, 8192)
    rows = benchmark(pack, lengths, 8192, "split", window=window)
    fill = lengths.sum() / ((len(rows.offsets) - 1) * 8192)
    benchmark.extra_info["fill"] = fill
    assert fill >= 0.999
