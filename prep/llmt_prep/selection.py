"""Which documents of the corpus go into which split, and in which order they reach the packer."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llmt_prep import mixture
from llmt_prep.config import MixConfig, SequenceConfig
from llmt_prep.corpus import Corpus
from llmt_prep.mixture import Mixture, Source
from llmt_prep.order import Documents, Shuffling, held_out_in_order, in_order
from llmt_prep.packing import landing
from llmt_prep.survey import SourceSurvey, survey
from llmt_prep.windows import in_windows, windows
from llmt_shared.errors import DataError


@dataclass(frozen=True)
class Selected:
    """The plan of a dataset's contents over a corpus; everything is by source."""

    surveys: tuple[SourceSurvey, ...]
    """What the corpus holds."""
    sources: tuple[Source, ...]
    """What of it may be trained on."""
    mixture: Mixture
    """How much of that is."""


def select(config: MixConfig, corpus: Corpus) -> Selected:
    """Hold documents out and decide what every source gives.

    Raises:
        ConfigError, DataError: as `mixture.plan`; a source without documents; under `overflow: error`, a document
            that is longer than a row.
    """
    shuffling, fraction = Shuffling(config.seed), config.holdout.fraction
    surveys = survey(corpus, corpus.source_borders, config.sequence, fraction, shuffling.block_tokens)
    if config.sequence.overflow == "error":
        _check_lengths(corpus, surveys, config.sequence.length)
    lands = partial(_landing, config.sequence)
    sources = []
    for (name, said), found in zip(config.sources.items(), surveys, strict=True):
        _check_documents(config, name, found)
        epochs = partial(in_order, corpus, found.blocks, fraction, name, shuffling)
        amounts = said.weight, said.epochs, said.tokens
        sources.append(Source(name, found.trainable_documents, found.available, epochs, lands, *amounts))
    return Selected(surveys, tuple(sources), mixture.plan(sources, config.budget, config.max_epochs))


def windows_of_splits(config: MixConfig, corpus: Corpus, selected: Selected) -> dict[str, Iterator[Documents]]:
    """Return, for each split that has documents, these window by window: validation has each once, unweighted."""
    size = config.packing.window
    splits = {"train": windows(selected.sources, selected.mixture, size)}
    if any(found.held_out_documents for found in selected.surveys):
        held_out = held_out_in_order(corpus, corpus.num_documents, config.holdout.fraction)
        splits["validation"] = in_windows(held_out, size)
    return splits


def _landing(sequence: SequenceConfig, documents: Documents) -> NDArray[np.int64]:
    return landing(documents.length, sequence.length, sequence.overflow, documents.outline[:, 0])


def _check_lengths(corpus: Corpus, surveys: tuple[SourceSurvey, ...], length: int) -> None:
    """Name the first document that is longer than a row."""
    too_long = sum(found.too_long for found in surveys)
    if too_long:
        first = next(found.first_too_long for found in surveys if found.too_long)
        raise DataError(
            f"{corpus.place(first)}: {corpus.lengths(first, first + 1)[0]} tokens, but a row has {length}; "
            f"{too_long} documents are too long; make rows longer, or set another sequence.overflow"
        )


def _check_documents(config: MixConfig, name: str, found: SourceSurvey) -> None:
    if not found.documents:
        said = config.sources[name]
        where = said.hf or ", ".join(said.path)
        raise DataError(f"sources.{name}: no documents; {where} holds no text that can be used")
    if not found.trainable_documents:
        raise DataError(f"sources.{name}: all {found.documents} documents are held out; lower holdout.fraction")
