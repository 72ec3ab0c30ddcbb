"""A simulation from its question to its answer: draw, try, multiply."""

import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmt_prep.cache import cache_of
from llmt_prep.config import MixConfig
from llmt_prep.executor import local
from llmt_prep.inputs import InputFile, list_files
from llmt_prep.simulation.forecast import Corpus, Forecast, contents, predict
from llmt_prep.simulation.pack_trial import pack_sample
from llmt_prep.simulation.rates import Rates, measured_rates, seconds_to_import
from llmt_prep.simulation.replica import join_rate, plan_replica
from llmt_prep.simulation.sample import Extent, draw_units, extents
from llmt_prep.simulation.settings import Scenario
from llmt_prep.simulation.timing import Cluster
from llmt_prep.simulation.tokenize_trial import SourceTrial, TokenizeTrial, tokenize_sample
from llmt_prep.store import token_dtype
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_shared.config import StrictModel

_LISTINGS, _LISTING_SECONDS = 5, 0.5
"""Files are found so often, or for so long: what is done for the first time is not done for every file."""


class SourceSample(StrictModel):
    """What is there of one source, and what its sample showed."""

    files: int
    bytes: int
    sampled_bytes: int
    sampled_units: int
    records: int
    documents: int
    quarantined: int
    tokens: int
    bytes_per_document: float
    tokens_per_document: float
    tokens_per_byte: float
    cache_per_byte: float
    """Bytes of tokenized units for each byte of input."""
    lengths: tuple[int, ...]
    """Documents of 1, 2-3, 4-7, 8-15, .. tokens."""
    documents_error: float | None
    """Standard error of the documents for each byte, as a share of it; ``None`` where too few units show none."""
    tokens_error: float | None
    """The same of the tokens for each byte."""


class Measured(StrictModel):
    """All that is not extrapolated: it was seen in this run, on this machine."""

    seconds: float
    """That the simulation took."""
    workers_wanted: int
    """Processes that would have measured together, had the sample had enough units for them."""
    engine_reason: str
    """Why the engine is not the fast one; empty where it is."""
    planned_documents: int
    """Made-up ones, to see what planning costs."""
    sources: dict[str, SourceSample]
    rates: Rates


class Simulation(StrictModel):
    """The whole answer."""

    asked: Scenario
    measured: Measured
    forecast: Forecast


def simulate(
    config: MixConfig, tokenizer: LoadedTokenizer, scenario: Scenario, workers: int, load_seconds: float
) -> Simulation:
    """Answer a question about a mix.

    Args:
        config: the mix.
        tokenizer: loaded, with its template.
        scenario: the question.
        workers: that `pack` would start here: the cores of the machines, where nothing is said of them.
        load_seconds: that loading the tokenizer took.

    Raises:
        ConfigError, DataError: as packing would.
    """
    started = time.monotonic()
    cluster = Cluster(
        machines=scenario.machines, cores=scenario.cores or workers, disk=scenario.disk, network=scenario.network
    )
    files, list_seconds = _listed(config)
    at_once = min(cluster.cores, workers, local().workers)
    with tempfile.TemporaryDirectory(prefix="llmt-simulate-") as folder:
        trial = tokenize_sample(
            config, tokenizer, files, draw_units(config, files, scenario.sample), Path(folder), at_once
        )
        corpus = Corpus(extents(config, files), trial.sources)
        rates, planned = _rates(trial, tokenizer, corpus, scenario, at_once, Path(folder), load_seconds, list_seconds)
    forecast = predict(trial.config, corpus, rates, scenario, cluster)
    measured = Measured(
        seconds=time.monotonic() - started,
        workers_wanted=at_once,
        engine_reason=trial.reason,
        planned_documents=planned,
        sources=dict(zip(config.sources, map(_described, corpus.extents, trial.sources), strict=True)),
        rates=rates,
    )
    return Simulation(asked=scenario, measured=measured, forecast=forecast)


def _listed(config: MixConfig) -> tuple[list[InputFile], float]:
    """All input files, and the seconds to find one."""
    seconds: list[float] = []
    while not seconds or (sum(seconds) < _LISTING_SECONDS and len(seconds) < _LISTINGS):
        started = time.monotonic()
        files, _ = list_files(config, cache_of(config))
        seconds.append(time.monotonic() - started)
    return files, min(seconds) / len(files)


def _rates(
    trial: TokenizeTrial,
    tokenizer: LoadedTokenizer,
    corpus: Corpus,
    scenario: Scenario,
    workers: int,
    folder: Path,
    load_seconds: float,
    list_seconds: float,
) -> tuple[Rates, int]:
    """Rates, and the documents that were planned for them."""
    found = contents(trial.config, corpus, scenario)
    epochs = {each.name: each.epochs for each in found.mixture.selections}
    packed = pack_sample(trial, tokenizer, folder / "sample", workers, found.splits["train"].segments)
    planned = plan_replica(trial, tokenizer, found.sizes, epochs, folder / "replica")
    join = join_rate(trial.config, folder / "join")
    itemsize = token_dtype(tokenizer.max_id).itemsize
    start = seconds_to_import() + load_seconds
    rates = measured_rates(list(epochs), trial, packed, planned, join, itemsize, start, list_seconds)
    return rates, planned.documents


def _described(extent: Extent, trial: SourceTrial) -> SourceSample:
    lengths = trial.documents.length
    documents = len(lengths)
    buckets = np.bincount(np.frexp(np.maximum(lengths, 1))[1] - 1)
    return SourceSample(
        files=extent.files,
        bytes=extent.bytes,
        sampled_bytes=trial.bytes,
        sampled_units=trial.units,
        records=trial.records,
        documents=documents,
        quarantined=trial.quarantined,
        tokens=trial.tokens,
        bytes_per_document=trial.bytes / documents,
        tokens_per_document=trial.tokens / documents,
        tokens_per_byte=trial.tokens / trial.bytes,
        cache_per_byte=trial.cache_bytes / trial.bytes,
        lengths=tuple(buckets.tolist()),
        documents_error=ratio_error(trial.by_unit[:, 1], trial.by_unit[:, 0], extent.units),
        tokens_error=ratio_error(trial.by_unit[:, 2], trial.by_unit[:, 0], extent.units),
    )


def ratio_error(amounts: NDArray[np.int64], sizes: NDArray[np.int64], population: int) -> float | None:
    """Return the standard error of sum(amounts) / sum(sizes), as a share of it; ``None`` for fewer than two units.

    Source: the ratio estimator of survey sampling, with its correction for a finite population; Cochran, Sampling
    Techniques, 1977, chapter 6.
    """
    amount, size = amounts.astype(np.float64), sizes.astype(np.float64)
    count = len(amount)
    if count < 2:
        return None
    residuals = amount - size * amount.sum() / size.sum()
    variance = float((residuals**2).sum()) / (count - 1) / count * max(0.0, 1 - count / population)
    return float(np.sqrt(variance) / amount.mean())
