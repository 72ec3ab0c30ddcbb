"""Which documents of the corpus go into which split, and in which order they reach the packer."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmt_prep import mixture
from llmt_prep.config import MixConfig
from llmt_prep.corpus import Corpus
from llmt_prep.mixture import Mixture, Shuffling, Source
from llmt_prep.packing import landing
from llmt_shared.errors import DataError


@dataclass(frozen=True)
class Selected:
    """The plan of a dataset's contents over a corpus."""

    mixture: Mixture
    sources: tuple[Source, ...]
    trainable: tuple[NDArray[np.int64], ...]
    """By source: corpus indices of the documents that may be trained on."""
    held_out: NDArray[np.int64]
    """Corpus indices of the validation documents."""


def select(config: MixConfig, corpus: Corpus) -> Selected:
    """Hold documents out and decide what every source gives.

    Raises:
        ConfigError, DataError: as `mixture.plan`; a source without documents.
    """
    held = mixture.held_out(corpus.text_hashes, config.holdout.fraction)
    sources, trainable = [], []
    borders = corpus.source_borders
    for (name, source), first, last in zip(config.sources.items(), borders, borders[1:], strict=False):
        if first == last:
            raise DataError(f"sources.{name}: no documents; {_where(config, name)} holds no text that can be used")
        mine = first + np.flatnonzero(~held[first:last])
        if not mine.size:
            raise DataError(f"sources.{name}: all {last - first} documents are held out; lower holdout.fraction")
        lengths = corpus.lengths[mine]
        lands = landing(lengths, config.sequence.length, config.sequence.overflow)
        sources.append(Source(name, lengths, lands, source.weight, source.epochs, source.tokens))
        trainable.append(mine)
    plan = mixture.plan(sources, config.budget, Shuffling(config.seed), config.max_epochs)
    return Selected(plan, tuple(sources), tuple(trainable), np.flatnonzero(held))


def windows_of_splits(config: MixConfig, selected: Selected) -> dict[str, Iterator[NDArray[np.int64]]]:
    """Return, for each split that has documents, their corpus indices window by window."""
    windows = {"train": _training_windows(config, selected)}
    if selected.held_out.size:
        windows["validation"] = _validation_windows(config, selected)
    return windows


def _training_windows(config: MixConfig, selected: Selected) -> Iterator[NDArray[np.int64]]:
    for window in mixture.windows(selected.sources, selected.mixture, Shuffling(config.seed), config.packing.window):
        out = np.empty(len(window.document), np.int64)
        for source, mine in enumerate(selected.trainable):
            places = window.source == source
            out[places] = mine[window.document[places]]
        yield out


def _validation_windows(config: MixConfig, selected: Selected) -> Iterator[NDArray[np.int64]]:
    """The held-out documents, each once, unweighted."""
    for start in range(0, len(selected.held_out), config.packing.window):
        yield selected.held_out[start : start + config.packing.window]


def _where(config: MixConfig, name: str) -> str:
    source = config.sources[name]
    return source.hf or ", ".join(source.path)
