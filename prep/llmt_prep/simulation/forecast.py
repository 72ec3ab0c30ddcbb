"""What a run on a corpus of another size will be: rows, fill, disk, memory and time, from what was measured here."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llmt_prep.config import MixConfig
from llmt_prep.corpus import SAVED_BYTES
from llmt_prep.hashes import IN_PROCESS_BYTES
from llmt_prep.mixture import Mixture
from llmt_prep.simulation.amounts import (
    SourceSize,
    SplitSize,
    amounts_scaled,
    factor_of,
    mix,
    scaled,
    size_of,
    train_size,
    validation_size,
)
from llmt_prep.simulation.disk import Disk, SplitDisk, disk_of, split_disk
from llmt_prep.simulation.fill import pack_drawn
from llmt_prep.simulation.rates import Rates
from llmt_prep.simulation.sample import Extent
from llmt_prep.simulation.settings import Scenario
from llmt_prep.simulation.timing import Cluster, Stage, Work, time_of
from llmt_prep.simulation.tokenize_trial import SourceTrial
from llmt_shared.config import StrictModel


class SourceForecast(SourceSize):
    """One source of the simulated corpus."""

    wanted: int
    """Tokens asked of it."""
    got: int
    """Tokens that it gives to the training rows."""
    epochs: float
    share: float
    """Of the tokens of the training rows."""


class SplitForecast(StrictModel):
    """The rows of one split."""

    documents: int
    """Selected ones, with repeats."""
    tokens: int
    """In rows."""
    segments: int
    rows: int
    fill: float
    fill_measured_on: int
    """Documents that were packed to see it."""
    fill_is_stable: bool
    shards: int
    disk: int
    """Bytes of its arrays."""


class Memory(StrictModel):
    """Bytes of resident memory at the most, without what the system keeps of files."""

    coordinator: int
    worker: int
    machine: int
    """With a worker for each core, and the coordinator."""


class Forecast(StrictModel):
    """All that is extrapolated."""

    factor: float
    """Times as large as the corpus that is there."""
    scaled_settings: tuple[str, ...]
    """Amounts of the mix that were scaled with it."""
    cluster: Cluster
    length: int
    sources: dict[str, SourceForecast]
    splits: dict[str, SplitForecast]
    disk: Disk
    memory: Memory
    stages: tuple[Stage, ...]
    seconds: float


class Corpus(NamedTuple):
    """The corpus of a mix by its sources: how much there is, and what its sample became."""

    extents: Sequence[Extent]
    trials: Sequence[SourceTrial]


class Contents(NamedTuple):
    """What of the simulated corpus goes where."""

    factor: float
    config: MixConfig
    """The mix with its amounts scaled."""
    sizes: list[SourceSize]
    mixture: Mixture
    splits: dict[str, SplitSize]


def contents(config: MixConfig, corpus: Corpus, scenario: Scenario) -> Contents:
    """Decide what a corpus of the size asked for gives to each split.

    Raises:
        ConfigError, DataError: the mix cannot have its amounts, as in a real run.
    """
    factor = factor_of(scenario, corpus.extents, corpus.trials)
    config = scaled(config, factor)
    sizes = [size_of(extent, trial, factor) for extent, trial in zip(corpus.extents, corpus.trials, strict=True)]
    samples = [trial.documents for trial in corpus.trials]
    mixture = mix(config, sizes, samples)
    splits = {"train": train_size(config, sizes, samples, mixture)}
    held_out = validation_size(config, sizes, samples)
    if sum(held_out.documents) >= 1 and held_out.tokens:
        splits["validation"] = held_out
    return Contents(factor, config, sizes, mixture, splits)


def predict(config: MixConfig, corpus: Corpus, rates: Rates, scenario: Scenario, cluster: Cluster) -> Forecast:
    """Return the forecast; nothing is measured, read or written.

    Args:
        config: the mix, its overflow resolved.
        corpus: its sources.
        rates: measured ones.
        scenario: size of the simulated corpus.
        cluster: what it is packed on.
    """
    found = contents(config, corpus, scenario)
    packed = {name: _packed(split, found.config, corpus, rates.itemsize) for name, split in found.splits.items()}
    splits = {name: forecast for name, (forecast, _) in packed.items()}
    disks = {name: disk for name, (_, disk) in packed.items()}
    works = _works(config, corpus, found, splits, disks, rates)
    stages = tuple(time_of(work, cluster) for work in works)
    return Forecast(
        factor=found.factor,
        scaled_settings=tuple(amounts_scaled(config)),
        cluster=cluster,
        length=config.sequence.length,
        sources=_sources(config, found),
        splits=splits,
        disk=_disk(found.sizes, disks, rates),
        memory=_memory(sum(size.units for size in found.sizes), rates, cluster),
        stages=stages,
        seconds=sum(stage.seconds for stage in stages),
    )


def _packed(split: SplitSize, config: MixConfig, corpus: Corpus, itemsize: int) -> tuple[SplitForecast, SplitDisk]:
    fill = pack_drawn(config, [trial.documents for trial in corpus.trials], split.documents)
    rows = fill.rows_for(split.tokens, config.sequence.length)
    disk = split_disk(config, rows, split.segments, split.spans, itemsize)
    forecast = SplitForecast(
        documents=round(sum(split.documents)),
        tokens=split.tokens,
        segments=split.segments,
        rows=rows,
        fill=split.tokens / (rows * config.sequence.length),
        fill_measured_on=fill.documents,
        fill_is_stable=fill.is_stable,
        shards=disk.shards,
        disk=disk.arrays,
    )
    return forecast, disk


def _sources(config: MixConfig, found: Contents) -> dict[str, SourceForecast]:
    total = sum(each.got for each in found.mixture.selections)
    return {
        name: SourceForecast(
            **size.model_dump(), wanted=each.wanted, got=each.got, epochs=each.epochs, share=each.got / total
        )
        for name, size, each in zip(config.sources, found.sizes, found.mixture.selections, strict=True)
    }


def _disk(sizes: Sequence[SourceSize], disks: Mapping[str, SplitDisk], rates: Rates) -> Disk:
    quarantine = rates.quarantine_line * sum(size.quarantined for size in sizes)
    manifest = rates.manifest_entry * sum(split.files for split in disks.values())
    return disk_of(
        disks,
        given=sum(size.bytes for size in sizes),
        cache=round(rates.tokenizer) + sum(size.cache_bytes for size in sizes),
        unit_list=SAVED_BYTES * sum(size.units for size in sizes),
        companions=round(rates.companions + quarantine + manifest),
    )


def _memory(units: int, rates: Rates, cluster: Cluster) -> Memory:
    coordinator = round(rates.plan_peak + units * rates.unit_memory)
    worker = round(max(rates.tokenize_peak, rates.gather_peak))
    if cluster.workers == 1:  # one process is both
        return Memory(coordinator=max(coordinator, worker), worker=worker, machine=max(coordinator, worker))
    return Memory(coordinator=coordinator, worker=worker, machine=coordinator + cluster.cores * worker)


def _works(
    config: MixConfig,
    corpus: Corpus,
    found: Contents,
    splits: Mapping[str, SplitForecast],
    disks: Mapping[str, SplitDisk],
    rates: Rates,
) -> list[Work]:
    files, given = (sum(getattr(size, key) for size in found.sizes) for key in ("files", "bytes"))
    units = sum(size.units for size in found.sizes)
    start = Work("start", alone=rates.process_start + files * rates.list_file, is_shared=False)
    hashing = Work(
        "hash",
        shared=given / rates.hash,
        longest=max(size.largest_file for size in found.sizes) / rates.hash,
        moved=given,
        startup=rates.hash_start,
        is_shared=given > IN_PROCESS_BYTES,
    )
    gathers = [_gather(name, split, disks[name], config, rates) for name, split in splits.items()]
    sidecars = sum(disk.sidecars for disk in disks.values())
    join = Work("join", alone=sidecars / rates.join, moved=2 * sidecars, is_shared=False)
    finish = Work("finish", alone=rates.finish + units * rates.unit_finish, is_shared=False)
    return [start, hashing, _tokenize(corpus, found, rates), _plan(found, disks, rates), *gathers, join, finish]


def _tokenize(corpus: Corpus, found: Contents, rates: Rates) -> Work:
    speeds = [rates.tokenize[name] for name in found.config.sources]
    largest = [_largest_unit(*each) for each in zip(corpus.extents, corpus.trials, found.sizes, strict=True)]
    return Work(
        "tokenize",
        alone=rates.choose + rates.unit_tokenize * sum(size.units for size in found.sizes),
        shared=sum(size.bytes / speed for size, speed in zip(found.sizes, speeds, strict=True)),
        longest=max(size / speed for size, speed in zip(largest, speeds, strict=True)),
        moved=sum(size.bytes + size.cache_bytes for size in found.sizes),
        startup=rates.tokenize_start,
        startup_alone=rates.tokenize_start_alone,
    )


def _largest_unit(extent: Extent, trial: SourceTrial, size: SourceSize) -> int:
    """Bytes; where a file is one unit, that of the largest file."""
    is_cut = extent.units > extent.files
    return min(size.bytes, int(trial.by_unit[:, 0].max()) if is_cut else extent.largest_file)


def _plan(found: Contents, disks: Mapping[str, SplitDisk], rates: Rates) -> Work:
    documents = sum(size.documents for size in found.sizes)
    read_twice = 2 * (4 + 8)  # length and hash of the text, for the survey and for the order
    moved = documents * read_twice + sum(disk.plan for disk in disks.values())
    return Work("plan", alone=documents * rates.plan, moved=moved, is_shared=False)


def _gather(name: str, split: SplitForecast, disk: SplitDisk, config: MixConfig, rates: Rates) -> Work:
    places = split.rows * config.sequence.length
    return Work(
        f"gather {name}",
        shared=places / rates.gather,
        longest=places / disk.shards / rates.gather,
        moved=2 * places * rates.itemsize + disk.plan + disk.sidecars,
        startup=rates.gather_start if disk.shards > 1 else rates.gather_start_alone,
        startup_alone=rates.gather_start_alone,
    )
