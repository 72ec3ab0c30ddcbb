"""A simulation as text: first what was measured here, then what is extrapolated from it, and what neither covers."""

from collections.abc import Iterator

from llmt_prep.report import count, histogram, percent, size, table
from llmt_prep.simulation.forecast import Forecast
from llmt_prep.simulation.run import Measured, Simulation
from llmt_prep.simulation.timing import Cluster

_MANY_UNITS = 200_000
"""Units whose number alone is felt."""
_FEW_DOCUMENTS = 1000


def render(simulation: Simulation) -> str:
    """Return the answer as text."""
    measured, forecast = simulation.measured, simulation.forecast
    rates = measured.rates
    processes = "1 process" if rates.workers == 1 else f"{rates.workers} processes at once"
    how = f"by the real code with {rates.engine} in {processes}"
    return "\n".join(
        [
            f"MEASURED HERE, in {duration(measured.seconds)}, {how}",
            "",
            _samples(measured),
            "",
            _rates(measured),
            "",
            f"EXTRAPOLATED from it: {_size(forecast)}, on {_machines(forecast.cluster)}",
            "",
            _sources(forecast),
            "",
            _splits(forecast),
            "",
            _places(forecast),
            "",
            _stages(forecast),
            "",
            *(f"- {note}" for note in notes(simulation)),
        ]
    )


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    for most, one, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < most:
            return f"{seconds / one:.{2 if seconds < 10 else 1}f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def notes(simulation: Simulation) -> Iterator[str]:
    """Yield what a reader must know to believe the numbers no more than they deserve."""
    measured, forecast = simulation.measured, simulation.forecast
    yield "the cache is taken to be empty at first, and to be kept"
    yield (
        f"{_times(forecast)} the corpus is as many times the files, none of them larger, in the same "
        f"proportions; documents like those of the sample"
    )
    if forecast.scaled_settings:
        yield f"scaled by the same factor: {', '.join(forecast.scaled_settings)}; weights, epochs and `max` stay"
    if forecast.cluster.machines > 1:
        yield "every core is taken to be as fast as one of this machine; the time has no starting of a cluster"
    if forecast.cluster.disk is None and forecast.cluster.network is None:
        yield "no `disk` and no `network` were given, so neither sets a limit beyond what the sample met here"
    yield from _doubts(measured, forecast)


def _doubts(measured: Measured, forecast: Forecast) -> Iterator[str]:
    if measured.engine_reason:
        yield f"the engine is tokenizers, because {measured.engine_reason}"
    if worst := max((each.documents_error or 0.0 for each in measured.sources.values()), default=0.0):
        yield f"documents for each byte vary from unit to unit: their standard error is up to {percent(worst)}"
    held_out = forecast.splits.get("validation")
    if held_out is not None and held_out.documents < _FEW_DOCUMENTS:
        yield (
            f"about {count(held_out.documents)} documents are held out: which ones, and so how many and how long, is "
            f"chance, and the rows of validation may be quite different"
        )
    if measured.rates.workers < measured.workers_wanted:
        yield (
            f"the sample kept {measured.rates.workers} of {measured.workers_wanted} workers busy: each was alone with "
            f"more of the machine than it will be; a larger `sample` shows more"
        )
    waiting = [name for name, share in measured.rates.busy.items() if share < 0.7]
    if waiting:
        yield f"{', '.join(waiting)} waited for disks or other programs while being measured: the rates are low ones"
    units = sum(source.units for source in forecast.sources.values())
    if units > _MANY_UNITS:
        yield (
            f"{count(units)} units: the coordinator opens each, for {duration(units * measured.rates.unit_tokenize)} "
            f"in all; a larger `unit_size` makes them fewer"
        )


def _size(forecast: Forecast) -> str:
    documents, given = (sum(getattr(each, key) for each in forecast.sources.values()) for key in ("documents", "bytes"))
    return f"{count(documents)} documents, {size(given)}, {_times(forecast)} the corpus"


def _times(forecast: Forecast) -> str:
    return f"{count(round(forecast.factor)) if forecast.factor >= 1000 else f'{forecast.factor:.4g}'} times"


def _machines(cluster: Cluster) -> str:
    machines = "1 machine" if cluster.machines == 1 else f"{count(cluster.machines)} machines"
    limits = [f"{name} {size(rate)}/s" for name, rate in (("disk", cluster.disk), ("network", cluster.network)) if rate]
    return " ".join([f"{machines} of {count(cluster.cores)} cores", *(f"({', '.join(limits)})" for _ in limits[:1])])


def _samples(measured: Measured) -> str:
    rows = [
        [
            name,
            size(each.bytes),
            size(each.sampled_bytes),
            count(each.documents),
            size(each.bytes_per_document),
            f"{each.tokens_per_document:.1f}",
            f"{each.tokens_per_byte:.4f}",
            count(each.quarantined),
            histogram(each.lengths),
        ]
        for name, each in measured.sources.items()
    ]
    header = ["source", "there", "sample", "documents", "bytes each", "tokens each", "tokens/byte", "bad"]
    return table([*header, "lengths 1, 2-3, 4-7, .. tokens"], rows)


def _rates(measured: Measured) -> str:
    rates = measured.rates
    rows = [
        ["hash", f"{size(rates.hash)}/s of input", "one core"],
        *([f"tokenize {name}", f"{size(rate)}/s of input", "one core"] for name, rate in rates.tokenize.items()),
        ["plan", f"{count(round(1 / rates.plan))} documents/s", "coordinator"],
        ["gather", f"{count(round(rates.gather))} tokens/s", "one core"],
        ["join", f"{size(rates.join)}/s of side-cars", "coordinator"],
        ["read", f"{size(rates.read)}/s of input", "one core, disk or memory"],
        ["start", duration(rates.process_start + rates.choose), "once"],
        ["start workers", duration(rates.tokenize_start), "once a stage"],
    ]
    return table(["what", "rate or time", "of"], rows)


def _sources(forecast: Forecast) -> str:
    rows = [
        [
            name,
            count(each.documents),
            size(each.bytes),
            count(each.units),
            count(each.tokens),
            count(each.got),
            percent(each.share),
            f"{each.epochs:.3f}",
        ]
        for name, each in forecast.sources.items()
    ]
    return table(["source", "documents", "input", "units", "tokens", "got", "share", "epochs"], rows)


def _splits(forecast: Forecast) -> str:
    rows = [
        [name, count(each.rows), count(each.tokens), percent(each.fill), count(each.shards), size(each.disk)]
        for name, each in forecast.splits.items()
    ]
    return table(["split", f"rows of {forecast.length}", "tokens", "fill", "shards", "disk"], rows)


def _places(forecast: Forecast) -> str:
    disk, memory = forecast.disk, forecast.memory
    rows = [
        ["input", size(disk.input), "stays"],
        ["cache of tokenized units", size(disk.cache), "stays"],
        ["staging: plan", size(disk.plan), "until the end"],
        ["staging: side-cars", size(disk.sidecars), "until the end"],
        ["dataset", size(disk.dataset), "stays"],
        ["all of it at the most", size(disk.peak), ""],
        ["memory of the coordinator", size(memory.coordinator), "at the most"],
        ["memory of a worker", size(memory.worker), "at the most"],
        ["memory of a machine", size(memory.machine), "coordinator and a worker for each core"],
    ]
    return table(["place", "bytes", ""], rows)


def _stages(forecast: Forecast) -> str:
    rows = [
        [each.name, duration(each.seconds), size(each.moved), duration(each.startup), each.bound_by]
        for each in forecast.stages
    ]
    total = ["in all", duration(forecast.seconds), size(sum(each.moved for each in forecast.stages)), "", ""]
    return table(["stage", "time", "moved", "start-up", "bound by"], [*rows, total])
