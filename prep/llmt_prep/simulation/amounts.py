"""How much of everything there is when the corpus has another size: arithmetic on what the sample showed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llmt_prep import mixture
from llmt_prep.config import MixConfig
from llmt_prep.mixture import Mixture, Source
from llmt_prep.order import Documents as Piece
from llmt_prep.packing import Overflow, landing
from llmt_prep.simulation.sample import Extent
from llmt_prep.simulation.settings import Scenario
from llmt_prep.simulation.tokenize_trial import Documents, SourceTrial
from llmt_shared.config import StrictModel

_LOTS = 1 << 20
"""Parts into which a source is cut where part of an epoch is selected: nobody notices a millionth."""


class SourceSize(StrictModel):
    """One source of the corpus that is simulated."""

    files: int
    bytes: int
    largest_file: int
    units: int
    documents: int
    tokens: int
    """Stored ones, before anything is held out, cut or dropped."""
    quarantined: int
    cache_bytes: int


@dataclass(frozen=True)
class SplitSize:
    """What goes into the rows of one split."""

    documents: tuple[float, ...]
    """Selected ones by source, each as often as it is selected."""
    tokens: int
    """That land in rows."""
    segments: int
    spans: int


def factor_of(scenario: Scenario, extents: Sequence[Extent], trials: Sequence[SourceTrial]) -> float:
    """Return how many times as large as the corpus the simulated one is."""
    parts = list(zip(extents, trials, strict=True))
    if scenario.bytes is not None:
        return scenario.bytes / max(1, sum(extent.bytes for extent in extents))
    if scenario.documents is not None:
        return scenario.documents / sum(len(trial.documents.length) * _grown(extent, trial) for extent, trial in parts)
    if scenario.tokens is not None:
        return scenario.tokens / sum(trial.tokens * _grown(extent, trial) for extent, trial in parts)
    return 1.0


def size_of(extent: Extent, trial: SourceTrial, factor: float) -> SourceSize:
    """Return a source ``factor`` times as large as it is: with as many times the files, none of them larger."""
    grown = factor * _grown(extent, trial)
    size = round(factor * extent.bytes)
    return SourceSize(
        files=max(1, round(factor * extent.files)),
        bytes=size,
        largest_file=min(size, extent.largest_file),
        units=max(1, round(factor * extent.units)),
        documents=max(1, round(grown * len(trial.documents.length))),
        tokens=max(1, round(grown * trial.tokens)),
        quarantined=round(grown * trial.quarantined),
        cache_bytes=round(grown * trial.cache_bytes),
    )


def _grown(extent: Extent, trial: SourceTrial) -> float:
    """How many times as large as its sample a source is."""
    return extent.bytes / max(1, trial.bytes)


def scaled(config: MixConfig, factor: float) -> MixConfig:
    """Return the mix with its amounts in tokens times ``factor``; weights, epochs and `budget: max` stay."""
    sources = {
        name: said if said.tokens is None else said.model_copy(update={"tokens": max(1, round(factor * said.tokens))})
        for name, said in config.sources.items()
    }
    budget = max(1, round(factor * config.budget)) if isinstance(config.budget, int) else config.budget
    return config.model_copy(update={"sources": sources, "budget": budget})


def amounts_scaled(config: MixConfig) -> list[str]:
    """Return the names of the settings that `scaled` changes."""
    tokens = [f"sources.{name}.tokens" for name, said in config.sources.items() if said.tokens is not None]
    return [*(["budget"] if isinstance(config.budget, int) else []), *tokens]


def mix(config: MixConfig, sizes: Sequence[SourceSize], samples: Sequence[Documents]) -> Mixture:
    """Decide how much each source gives, by the very code that packing decides with.

    Raises:
        ConfigError, DataError: as `mixture.plan`.
    """
    sources = []
    for (name, said), size, sample in zip(config.sources.items(), sizes, samples, strict=True):
        documents = trainable(config, size)
        available = round(documents * float(landed(config, sample).mean()))
        lots = _lots(available)
        amounts = said.weight, said.epochs, said.tokens
        sources.append(Source(name, max(1, round(documents)), available, partial(_in_lots, lots), _lands, *amounts))
    return mixture.plan(sources, config.budget, config.max_epochs)


def trainable(config: MixConfig, size: SourceSize) -> float:
    """Return how many of a source's documents are not held out."""
    return size.documents * (1 - config.holdout.fraction)


def landed(config: MixConfig, sample: Documents) -> NDArray[np.int64]:
    """Return how many tokens of each sampled document land in rows: [D]."""
    return landing(sample.length, config.sequence.length, cut(config), sample.outline[:, 0])


def cut(config: MixConfig) -> Overflow:
    """Return what becomes of long documents; under `error` the sample has none, and nothing is cut."""
    return "split" if config.sequence.overflow == "error" else config.sequence.overflow


def train_size(
    config: MixConfig, sizes: Sequence[SourceSize], samples: Sequence[Documents], planned: Mixture
) -> SplitSize:
    """Return what the rows for training hold."""
    parts = zip(planned.selections, sizes, strict=True)
    return _split_size(config, [each.epochs * trainable(config, size) for each, size in parts], samples)


def validation_size(config: MixConfig, sizes: Sequence[SourceSize], samples: Sequence[Documents]) -> SplitSize:
    """Return what the rows for validation hold, which may be nothing."""
    return _split_size(config, [size.documents * config.holdout.fraction for size in sizes], samples)


def _split_size(config: MixConfig, documents: Sequence[float], samples: Sequence[Documents]) -> SplitSize:
    tokens = segments = spans = 0.0
    sides = 2 if config.kind == "preference" else 1
    for count, sample in zip(documents, samples, strict=True):
        lands = landed(config, sample)
        tokens += count * float(lands.mean())
        segments += count * float((-(-lands // config.sequence.length)).mean()) * sides
        spans += count * float((sample.num_spans * (lands > 0)).mean())
    return SplitSize(tuple(documents), math.ceil(tokens), math.ceil(segments), math.ceil(spans))


def _lots(available: int) -> NDArray[np.int64]:
    count = max(1, min(_LOTS, available))
    borders = np.floor(np.linspace(0, available, count + 1)).astype(np.int64)
    borders[-1] = available  # whatever floating point made of it
    return np.diff(borders)


def _in_lots(lots: NDArray[np.int64], epoch: int) -> Iterator[Piece]:
    """An order of a source whose documents are its lots: any epoch is like any other."""
    del epoch
    numbers = np.arange(len(lots))
    yield Piece(numbers, lots, numbers, np.broadcast_to(np.uint32(0), (len(lots), 2)))


def _lands(piece: Piece) -> NDArray[np.int64]:
    return piece.length
