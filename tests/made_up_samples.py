"""A corpus and rates that nobody measured, for the arithmetic of forecasts."""

from typing import Any

import numpy as np

from llmt_prep.config import MixConfig
from llmt_prep.simulation.forecast import Corpus
from llmt_prep.simulation.rates import Rates
from llmt_prep.simulation.sample import Extent
from llmt_prep.simulation.tokenize_trial import Documents, SourceTrial

CAPACITY = 512


def mix(sources: dict[str, dict[str, Any]], **changes: Any) -> MixConfig:
    named = {name: {"path": name} | said for name, said in sources.items()}
    said = {"output": "o", "tokenizer": "t", "sequence": {"length": CAPACITY}, "sources": named}
    return MixConfig.model_validate(said | changes)


def trial(seed: int, count: int = 500, mean: float = 5.0) -> SourceTrial:
    """Ten units of a source with web-like lengths."""
    lengths = (np.random.default_rng(seed).lognormal(mean, 1, count) + 1).astype(np.int64)
    documents = Documents(lengths, np.zeros((count, 2), np.uint32), np.zeros(count, np.int64))
    tokens = int(lengths.sum())
    units = np.array([[4 * part.sum(), len(part), part.sum()] for part in np.array_split(lengths, 10)])
    return SourceTrial(4 * tokens, 10, count, 0, tokens, 2 * tokens + 16 * count, units, documents, 1.0, 1.0)


def corpus(*sizes: int) -> Corpus:
    """Sources of so many bytes in 20 files each."""
    trials = [trial(seed) for seed in range(len(sizes))]
    return Corpus([Extent(20, size, size // 10, 40 + size // 1_000_000) for size in sizes], trials)


def rates(names: list[str], **changes: Any) -> Rates:
    said = {
        "workers": 2, "engine": "made up", "itemsize": 2, "read": 1e9, "hash": 1e9,
        "tokenize": dict.fromkeys(names, 1e8), "gather": 3e8, "plan": 5e-7, "join": 3e8, "process_start": 0.5,
        "list_file": 1e-5, "choose": 0.2, "hash_start": 0.3, "tokenize_start": 0.6, "tokenize_start_alone": 0.2,
        "gather_start": 0.4, "gather_start_alone": 0.1, "finish": 0.1, "unit_tokenize": 1e-4,
        "unit_finish": 2e-4, "tokenizer": 1e6, "companions": 1e6, "manifest_entry": 170,
        "quarantine_line": 200, "plan_peak": 3e8, "tokenize_peak": 2e8, "gather_peak": 2e8, "unit_memory": 150,
        "busy": {},
    }  # fmt: skip
    return Rates.model_validate(said | changes)
