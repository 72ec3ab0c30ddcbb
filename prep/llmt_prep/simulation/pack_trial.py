"""The second half of the real code on the sample: select, pack, gather and finish, with the clock running."""

import time
from pathlib import Path
from typing import NamedTuple

from llmt_prep import corpus as corpora
from llmt_prep import finish, staging
from llmt_prep.config import HoldoutConfig, Kind, MixConfig, resolved
from llmt_prep.corpus import Corpus
from llmt_prep.ledger import Ledger, source_ledgers
from llmt_prep.rows import load_rows, write_rows
from llmt_prep.selection import Selected, select, windows_of_splits
from llmt_prep.shards import SplitTask, Totals, finish_split, num_shards, rows_per_shard, write_shard
from llmt_prep.simulation.clocks import Clocked, clocked
from llmt_prep.simulation.tokenize_trial import TokenizeTrial
from llmt_prep.store import token_dtype
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_shared.manifest import NAME, SplitEntry

_RECIPE = "of a trial"
_SHARD_BYTES = 64_000_000
_SHARDS_PER_WORKER = 2
_MOST_BYTES = 1_000_000_000
"""Of all shards together: room that a temporary directory should have."""


class PackTrial(NamedTuple):
    """What packing the sample took."""

    gathering: Clocked
    places: int
    """Places for tokens in the rows of the shards that were gathered, padding too."""
    finish_seconds: float
    """Of writing what is not tokens: a run does it once."""
    companions: float
    """Bytes of tokenizer, mix, ledger and metadata, their lines in the manifest too."""
    manifest_entry: float
    """Bytes for each file in the manifest."""
    quarantine_line: float
    """Bytes for each bad record."""


def in_epochs(config: MixConfig, epochs: dict[str, float]) -> MixConfig:
    """Return the mix with so many epochs of each source, and nothing held out."""
    sources = {
        name: said.model_copy(update={"weight": None, "tokens": None, "epochs": epochs[name]})
        for name, said in config.sources.items()
    }
    return config.model_copy(update={"sources": sources, "budget": None, "holdout": HoldoutConfig()})


def pack_sample(
    trial: TokenizeTrial, tokenizer: LoadedTokenizer, folder: Path, workers: int, num_segments: int
) -> PackTrial:
    """Pack the sample into a folder, as often as gives every worker some shards.

    Args:
        trial: the tokenized sample.
        tokenizer: for the finished dataset.
        folder: gets plan and dataset.
        workers: processes that gather.
        num_segments: of the simulated plan, for which the loops are chosen.

    Raises:
        ConfigError, DataError: as `selection.select`.
    """
    dtype = token_dtype(tokenizer.max_id)
    shard = min(trial.config.shard_size, _SHARD_BYTES, _MOST_BYTES // (_SHARDS_PER_WORKER * workers))
    wanted = _SHARDS_PER_WORKER * workers * shard / dtype.itemsize
    epochs = max(1.0, wanted / max(1, sum(each.tokens for each in trial.sources)))
    config = in_epochs(trial.config, dict.fromkeys(trial.config.sources, epochs))
    selected = select(config, trial.corpus)
    num_rows = _plan(config, trial.corpus, selected, folder)
    length = config.sequence.length
    per_shard = rows_per_shard(num_rows, length, dtype.itemsize, shard)
    task = train_task(folder, len(config.sources), length, per_shard, dtype.name, config.kind)
    tasks = [(task, number, num_segments) for number in range(num_shards(num_rows, per_shard))]
    gathering = clocked("gather", write_shard, tasks, tasks[: max(1, min(workers, len(tasks) // 2))])
    totals = finish_split(task)
    started = time.monotonic()
    ledger = _ledger(config, trial, selected, task.plan_directory, totals)
    _finish(config, trial, tokenizer, ledger, folder / "data", totals)
    seconds = time.monotonic() - started
    return _measured(folder / "data", gathering, num_rows * length, seconds, trial, totals)


def train_task(folder: Path, num_sources: int, length: int, per_shard: int, dtype: str, kind: Kind) -> SplitTask:
    """Return what the shards of a trial share, whose plan is in the folder."""
    staging.name_recipe(folder, _RECIPE)
    return SplitTask(str(folder), "train", num_sources, length, per_shard, dtype, seed=0, kind=kind, recipe=_RECIPE)


def _plan(config: MixConfig, corpus: Corpus, selected: Selected, folder: Path) -> int:
    """Write the plan; returns its rows."""
    corpora.save(corpus, corpora.saved_in(folder))
    windows, rows = windows_of_splits(config, corpus, selected)["train"], folder / "rows" / "train"
    write_rows(rows, windows, corpus, config.sequence.length, config.sequence.overflow, config.packing.carry)
    return load_rows(rows).num_rows


def _ledger(config: MixConfig, trial: TokenizeTrial, selected: Selected, rows: Path, totals: Totals) -> Ledger:
    tallies = {"train": load_rows(rows).tallies}
    in_rows = {"train": totals.tokens_of_source}
    files = dict.fromkeys(range(len(config.sources)), 1)
    return Ledger(sources=source_ledgers(config, trial.corpus, selected, files, tallies, in_rows), splits={})


def _finish(
    config: MixConfig, trial: TokenizeTrial, tokenizer: LoadedTokenizer, ledger: Ledger, data: Path, totals: Totals
) -> None:
    read = {each.file for each in trial.inputs.units}
    files = [file for number, file in enumerate(trial.inputs.files) if number in read]
    finish.write_companions(data, resolved(config, {}, None), tokenizer, ledger, files, trial.corpus)
    header = {
        "kind": config.kind,
        "length": config.sequence.length,
        "sources": tuple(config.sources),
        "tokenizer": finish.tokenizer_entry(tokenizer),
        "recipe": "0" * 64,
        "splits": {"train": {key: getattr(totals, key) for key in SplitEntry.model_fields}},
    }
    finish.write_manifest(data, header, totals.sha256)


def _measured(
    data: Path, gathering: Clocked, places: int, seconds: float, trial: TokenizeTrial, totals: Totals
) -> PackTrial:
    sizes = {path.relative_to(data).as_posix(): path.stat().st_size for path in data.rglob("*") if path.is_file()}
    manifest, quarantine = sizes.pop(NAME), sizes.pop("quarantine.jsonl")
    chunks = sum(path.stat().st_size for path in totals.sha256)
    entry = manifest / len(sizes)
    return PackTrial(
        gathering=gathering,
        places=places,
        finish_seconds=seconds,
        companions=sum(sizes.values()) - chunks + entry * (len(sizes) - len(totals.sha256)),
        manifest_entry=entry,
        quarantine_line=quarantine / max(1, sum(each.quarantined for each in trial.sources)),
    )
