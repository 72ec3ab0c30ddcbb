"""What the coordinator does for every document and every unit: measured on a token store that is made up.

A sample is too small to show it. So units are written with lengths drawn from the sample, as many documents to a unit
as a real one has; their tokens are holes in files. Survey, selection, packing and the books are the real code.
"""

import json
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep import corpus as corpora
from llmt_prep.config import MixConfig
from llmt_prep.corpus import Corpus, Counting
from llmt_prep.hashes import Job, file_hashes
from llmt_prep.inputs import HashedUnits, Inputs, InputUnit
from llmt_prep.order import Documents as Piece
from llmt_prep.packing import best_fit_decreasing
from llmt_prep.places import place_units
from llmt_prep.rows import load_rows, write_rows
from llmt_prep.selection import select, windows_of_splits
from llmt_prep.shards import finish_split, write_shard
from llmt_prep.simulation.amounts import SourceSize
from llmt_prep.simulation.clocks import peak_of_block
from llmt_prep.simulation.fill import draw
from llmt_prep.simulation.pack_trial import in_epochs, train_task
from llmt_prep.simulation.tokenize_trial import Documents, TokenizeTrial
from llmt_prep.store import COUNTED, UnitMeta, open_unit, read_quarantine, unit_folder
from llmt_prep.tokenizer import LoadedTokenizer

MOST_DOCUMENTS = 1_000_000
MOST_SELECTED = 1_500_000
"""With repeats."""
MOST_UNITS = 400
_AT_LEAST = 1000
"""Documents of each source, however small its part is: of few, none may fit a row, or all be held out."""
_COUNTED_UNITS = 4000
"""So many that what is not for each unit is small beside it."""
_TINY_DOCUMENTS = 1_000_000
_TRIES = 3


class PlanRates(NamedTuple):
    """What planning and keeping books cost one process."""

    documents: int
    """That were planned to see it."""
    plan_seconds: float
    """For each document of the corpus: survey, selection, packing, writing the plan."""
    peak: int
    """Bytes of resident memory of this process while it planned."""
    tokenize_seconds: float
    """For each unit: naming it, and counting what is in it when it is there."""
    finish_seconds: float
    """For each unit: the quarantine, if it has one."""
    unit_memory: float
    """Bytes for each unit in the coordinator; a worker that gathers maps the file in which they are listed."""


def plan_replica(
    trial: TokenizeTrial,
    tokenizer: LoadedTokenizer,
    sizes: Sequence[SourceSize],
    epochs: dict[str, float],
    folder: Path,
) -> PlanRates:
    """Plan a made-up corpus of the simulated proportions, with the clock running.

    Args:
        trial: the tokenized sample.
        tokenizer: names the units.
        sizes: of the simulated sources.
        epochs: of them, as the mixture gives them.
        folder: for what is written.
    """
    samples = [source.documents for source in trial.sources]
    counts = _documents(sizes, list(epochs.values()), samples)
    per_unit = [max(1, len(each.documents.length) // each.units) for each in trial.sources]
    corpus = write_store(folder / "units", samples, counts, per_unit, trial.config.seed)
    config = in_epochs(trial.config, epochs).model_copy(update={"holdout": trial.config.holdout})
    best_fit_decreasing(np.ones(MOST_DOCUMENTS, np.int32), 2)  # loads the loops before the clock runs
    with peak_of_block() as peak:
        started = time.monotonic()
        selected = select(config, corpus)
        for split, windows in windows_of_splits(config, corpus, selected).items():
            sequence = config.sequence
            rows = folder / "rows" / split
            write_rows(rows, windows, corpus, sequence.length, sequence.overflow, config.packing.carry)
        planned = time.monotonic()
    corpora.save(corpus, corpora.saved_in(folder))
    tokenize_seconds, unit_memory = _unit_costs(trial, tokenizer, folder)
    return PlanRates(
        documents=corpus.num_documents,
        plan_seconds=(planned - started) / corpus.num_documents,
        peak=peak[0],
        tokenize_seconds=tokenize_seconds,
        finish_seconds=_finish_costs(corpus) * float(trial.corpus.units["bad"].mean()),
        unit_memory=unit_memory,
    )


def join_rate(config: MixConfig, folder: Path) -> float:
    """Return the bytes of side-cars a second that `finish_split` joins: of very many, very short documents."""
    ones = Documents(np.ones(1, np.int64), np.zeros((1, 2), np.uint32), np.zeros(1, np.int64))
    corpus = write_store(folder / "units", [ones], [_TINY_DOCUMENTS], [_TINY_DOCUMENTS], config.seed)
    corpora.save(corpus, corpora.saved_in(folder))
    lengths = corpus.lengths(0, _TINY_DOCUMENTS)
    numbers = np.arange(_TINY_DOCUMENTS)
    everything = Piece(numbers, lengths, np.cumsum(lengths) - lengths, corpus.outlines(0, _TINY_DOCUMENTS))
    length = 4096
    write_rows(folder / "rows" / "train", iter([everything]), corpus, length, "split", 0.0)
    num_rows = load_rows(folder / "rows" / "train").num_rows
    task = train_task(folder, 1, length, num_rows, "uint16", "pretrain")
    write_shard(task, 0)
    seconds = []
    for _ in range(_TRIES):
        started = time.monotonic()
        finish_split(task)
        seconds.append(time.monotonic() - started)
    return task.sidecar(0).stat().st_size / median(seconds)


def write_store(
    folder: Path, samples: Sequence[Documents], counts: Sequence[int], per_unit: Sequence[int], seed: int
) -> Corpus:
    """Write units of the token store without tokens, and return the corpus that they are.

    Args:
        folder: gets the units.
        samples: documents of each source, from which are drawn:
        counts: so many of each source, and
        per_unit: so many to a unit.
        seed: of the draw, and of the hashes of texts.
    """
    generator = np.random.default_rng(seed)
    units: list[tuple[int, str]] = []
    for source, (sample, count, size) in enumerate(zip(samples, counts, per_unit, strict=True)):
        chosen = draw(len(sample.length), 0, count, (seed, source))
        for first in range(0, count, size):
            mine, key = chosen[first : first + size], f"{len(units):064x}"
            _write_unit(unit_folder(folder, key), sample, mine, generator.integers(0, 1 << 64, len(mine), "<u8"))
            units.append((source, key))
    return corpora.read_corpus(folder, [(source, f"file-{source}") for source in range(len(samples))], units)


def _write_unit(unit: Path, sample: Documents, chosen: NDArray[np.int64], hashes: NDArray[np.uint64]) -> None:
    length, outline, num_spans = sample.length[chosen], sample.outline[chosen], sample.num_spans[chosen]
    has_targets, spans, tokens = bool(sample.num_spans.any()), int(num_spans.sum()), int(length.sum())
    columns: dict[str, NDArray[Any]] = {"lengths": length, "records": np.arange(len(chosen))}
    if has_targets:
        columns |= {"first_target": outline[:, 0], "chosen_length": outline[:, 1], "num_spans": num_spans}
    unit.mkdir(parents=True)
    for name, values in columns.items():
        values.astype("<u4").tofile(unit / name)
    hashes.tofile(unit / "text_hash")
    holes = {"tokens": 2 * tokens} | (dict.fromkeys(("span_start", "span_length"), 4 * spans) if has_targets else {})
    for name, size in holes.items():
        with (unit / name).open("wb") as file:
            file.truncate(size)
    (unit / "quarantine.jsonl").touch()
    counts = dict.fromkeys(COUNTED, 0) | dict.fromkeys(("records", "documents", "lines"), len(chosen))
    counts |= {"tokens": tokens, "spans": spans}
    meta = UnitMeta(**counts, engine="", dtype="uint16", checksums={}, has_targets=has_targets)
    (unit / "meta.json").write_text(json.dumps(asdict(meta)))


def _documents(sizes: Sequence[SourceSize], epochs: Sequence[float], samples: Sequence[Documents]) -> list[int]:
    """How many documents to plan of each source: in proportion, and no more than can be planned in seconds."""
    documents = np.array([size.documents for size in sizes], np.float64)
    selected = documents * np.maximum(1, epochs)
    units = np.array([size.units for size in sizes], np.float64)
    part = min(1.0, MOST_DOCUMENTS / documents.sum(), MOST_SELECTED / selected.sum(), MOST_UNITS / units.sum())
    pairs = zip(sizes, samples, strict=True)
    least = [min(size.documents, max(_AT_LEAST, len(sample.length))) for size, sample in pairs]
    return [max(few, round(part * size.documents)) for few, size in zip(least, sizes, strict=True)]


def _finish_costs(corpus: Corpus) -> float:
    """Seconds for each unit, to read its quarantine; all else is known by then."""

    def know() -> object:
        return [list(read_quarantine(corpus.directory(unit))) for unit in range(len(corpus.units))]

    return _costs(know, len(corpus.units))[0]


def _unit_costs(trial: TokenizeTrial, tokenizer: LoadedTokenizer, folder: Path) -> tuple[float, float]:
    """Seconds and bytes for each unit: to keep its hash, to name it, and to know what is in it."""
    times, meta_of = -(-_COUNTED_UNITS // len(trial.inputs.units)), trial.corpus.directory(0)

    def know() -> object:
        inputs = _repeated(trial, times)
        places = place_units(trial.config, inputs, tokenizer, folder)
        places.are_first()
        counting = Counting(places.units, len(trial.config.sources))
        for number in range(len(places)):
            counting.add(number, open_unit(meta_of).meta)
        return inputs, counting.corpus([folder], [], [], places.first_unit)

    return _costs(know, times * len(trial.inputs.units))


def _repeated(trial: TokenizeTrial, times: int) -> Inputs:
    """The files of the sample, with their units so many times, as if each had other content."""
    by_file: dict[int, list[InputUnit]] = {}
    for each in trial.inputs.units:
        by_file.setdefault(each.file, []).append(each)
    files = [trial.inputs.files[file] for file in by_file]
    jobs = [Job(file, of_file[0].unit.reader, 0) for file, of_file in zip(files, by_file.values(), strict=True)]
    hashes = [
        file_hashes(
            "0" * 64,
            [each.unit for each in of_file] * times,
            (f"{file:016x}{number:016x}" for number in range(len(of_file) * times)),
        )
        for file, of_file in by_file.items()
    ]
    return Inputs(tuple(files), HashedUnits(jobs, hashes), {})


def _costs(call: Callable[[], object], count: int) -> tuple[float, float]:
    """Seconds and bytes for each of ``count`` things that a call is about."""
    seconds = []  # the least counts: what a busy machine adds to so little would be multiplied by millions
    for _ in range(_TRIES):
        started = time.monotonic()
        call()
        seconds.append(time.monotonic() - started)
    tracemalloc.start()
    try:
        kept = call()
        size = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert kept is not None
    return min(seconds) / count, size / count
