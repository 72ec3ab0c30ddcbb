"""The first half of the real code on the sample: hashing and tokenizing, with the engine that a run would choose."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep import documents
from llmt_prep.cache import cache_of, tokenizer_directory
from llmt_prep.choice import Choice, choose_engine
from llmt_prep.config import MixConfig
from llmt_prep.corpus import Corpus
from llmt_prep.documents import Unit
from llmt_prep.executor import HERE
from llmt_prep.guard import inexact_engines
from llmt_prep.held import Shelved
from llmt_prep.ingest import shelve_tokenizer, tokenize_inputs
from llmt_prep.inputs import InputFile, Inputs, InputUnit, reading_of
from llmt_prep.places import Place, Places, place_units, with_formats
from llmt_prep.simulation.clocks import Clocked, clocked
from llmt_prep.tokenization import hash_content
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_prep.unit_task import TokenizeTask, keeps_control, run_task
from llmt_shared.errors import DataError


class Documents(NamedTuple):
    """The sampled documents of one source, D of them, as planning sees them."""

    length: NDArray[np.int64]
    """[D] stored tokens."""
    outline: NDArray[np.uint32]
    """[D, 2]; as `Columns.outlines` gives it."""
    num_spans: NDArray[np.int64]
    """[D]; 0 of text."""


class SourceTrial(NamedTuple):
    """What became of one source's sample."""

    bytes: int
    """Of input, as it lies on the disk."""
    units: int
    records: int
    quarantined: int
    tokens: int
    cache_bytes: int
    """Of its units in the token store."""
    by_unit: NDArray[np.int64]
    """[units, 3] bytes, documents and tokens."""
    documents: Documents
    hash_seconds: float
    """Of one core, the input being in memory."""
    tokenize_seconds: float
    """Of one core."""


class TokenizeTrial(NamedTuple):
    """Everything that the sample was tokenized into."""

    config: MixConfig
    """The mix, with the formats of chats said."""
    inputs: Inputs
    corpus: Corpus
    sources: tuple[SourceTrial, ...]
    engine: str
    reason: str
    """Why it is not the fast one; empty where it is."""
    tokenizer_bytes: int
    """Of its files, which lie in the cache too."""
    choose_seconds: float
    """Until the engine was chosen, edge cases and all."""
    read_rate: float
    """Bytes a second at which one worker read input, from the disk or, where it was read not long ago, from memory."""
    hashing: Clocked
    tokenizing: Clocked


def tokenize_sample(
    config: MixConfig,
    tokenizer: LoadedTokenizer,
    files: Sequence[InputFile],
    units: Sequence[InputUnit],
    folder: Path,
    workers: int,
) -> TokenizeTrial:
    """Hash and tokenize the sample into a folder, with the clock running.

    Raises:
        ConfigError, DataError: as packing would, such as for more bad records than `max_bad`.
    """
    reads = [(each.unit,) for each in units]
    hashing = clocked("hash", hash_unit, reads, reads[: _at_once(reads, workers)])
    hashed = tuple(each._replace(content=call.result[0]) for each, call in zip(units, hashing.calls, strict=True))
    inputs = Inputs(tuple(replace(file, sha256="0" * 64) for file in files), hashed, {})
    config = with_formats(config, inputs)
    cache = folder / "cache"
    places = place_units(config, inputs, tokenizer, cache)
    started = time.monotonic()
    shelved = shelve_tokenizer(config, cache, tokenizer)
    choice = _choose(config, tokenizer, shelved, places[0])
    chosen = time.monotonic()
    unique = list({place.directory: place for place in places}.values())
    tasks = [(_task(config, files[place.file], place, shelved, choice.is_fast),) for place in unique]
    again = [(replace(task, directory=str(folder / f"again-{n}")),) for n, (task,) in enumerate(tasks)]
    tokenizing = clocked("tokenize", run_task, tasks, again[: _at_once(tasks, workers)])
    corpus = tokenize_inputs(config, inputs, tokenizer, cache, HERE)  # finds everything done
    _require_documents(config, corpus)
    seconds = {place.directory: call.seconds for place, call in zip(unique, tokenizing.calls, strict=True)}
    return TokenizeTrial(
        config=config,
        inputs=inputs,
        corpus=corpus,
        sources=tuple(_source(n, places, hashing, seconds, corpus) for n in range(len(config.sources))),
        engine=tokenizing.calls[0].result.engine,
        reason=choice.reason,
        tokenizer_bytes=sum(map(len, tokenizer.files.values())),
        choose_seconds=chosen - started,
        read_rate=sum(place.bytes for place in places) / max(1e-9, sum(call.result[1] for call in hashing.calls)),
        hashing=hashing,
        tokenizing=tokenizing,
    )


def hash_unit(unit: Unit) -> tuple[str, float, float]:
    """Read a unit, then hash it as a run does; its content's hash, and the seconds of either."""
    started = time.monotonic()
    for _ in documents.unit_bytes(unit):
        pass
    read = time.monotonic()
    content = hash_content(unit, hashlib.sha256().update)
    return content, read - started, time.monotonic() - read


def _require_documents(config: MixConfig, corpus: Corpus) -> None:
    for name, count in zip(config.sources, np.diff(corpus.source_borders).tolist(), strict=True):
        if not count:
            raise DataError(f"sources.{name}: its sample holds no document that can be used; give a larger `sample`")


def _at_once(tasks: Sequence[object], workers: int) -> int:
    """Workers that can be warm and still find something to do."""
    return max(1, min(workers, len(tasks) // 2))


def _choose(config: MixConfig, tokenizer: LoadedTokenizer, shelved: Shelved, place: Place) -> Choice:
    inexact = inexact_engines(tokenizer_directory(cache_of(config), tokenizer.digest))
    return choose_engine(config.engine, shelved, keep_control=keeps_control(place.settings), inexact=inexact)


def _task(config: MixConfig, file: InputFile, place: Place, tokenizer: Shelved, is_fast: bool) -> TokenizeTask:
    return TokenizeTask(
        unit=place.unit,
        reading=reading_of(config, list(config.sources.values())[place.source]),
        settings=place.settings,
        tokenizer=tokenizer,
        is_fast=is_fast,
        begins_source=False,  # what the guard does once for a source must not be taken for what a unit costs
        directory=str(place.directory),
        file=file,
        origin=place.origin,
        ahead=None,
    )


def _source(source: int, places: Places, hashing: Clocked, seconds: dict[Path, float], corpus: Corpus) -> SourceTrial:
    mine = [number for number, place in enumerate(places) if place.source == source]
    metas = [corpus.open_unit(number).meta for number in mine]
    sizes = [places[number].bytes for number in mine]
    counts = [(size, meta.documents, meta.tokens) for size, meta in zip(sizes, metas, strict=True)]
    return SourceTrial(
        bytes=sum(sizes),
        units=len(mine),
        records=sum(meta.records for meta in metas),
        quarantined=sum(meta.quarantined for meta in metas),
        tokens=sum(meta.tokens for meta in metas),
        cache_bytes=sum(file.stat().st_size for number in mine for file in places[number].directory.iterdir()),
        by_unit=np.array(counts, np.int64).reshape(-1, 3),
        documents=_documents(source, mine, corpus),
        hash_seconds=sum(hashing.calls[number].result[2] for number in mine),
        tokenize_seconds=sum(seconds[places[number].directory] for number in mine),
    )


def _documents(source: int, units: Sequence[int], corpus: Corpus) -> Documents:
    first, last = corpus.source_borders[source : source + 2].tolist()
    spans = [corpus.open_unit(unit).targets.num_spans for unit in units if corpus.has_targets]
    num_spans = np.concatenate(spans).astype(np.int64) if spans else np.zeros(last - first, np.int64)
    return Documents(corpus.lengths(first, last), corpus.outlines(first, last), num_spans)
