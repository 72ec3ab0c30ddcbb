"""The whole of stage one: find -> tokenize -> select -> pack -> gather -> finish.

Every stage writes files that are whole or absent and skips what is there, so running again after any stop goes on.
The bytes of the dataset depend on the mix and the input alone: not on workers, unit sizes, kills or the cache.
"""

import json
import os
import platform
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmt_prep import corpus as corpora
from llmt_prep import finish, shards, staging, uploading
from llmt_prep.cache import being_read, cache_of, in_use, is_cache, lock_of, tokenizer_directory
from llmt_prep.config import MixConfig, resolved
from llmt_prep.corpus import Corpus
from llmt_prep.documents import check_unchanged
from llmt_prep.executor import Executor, local, opened
from llmt_prep.explain import CacheUse, cache_use
from llmt_prep.guard import inexact_engines
from llmt_prep.ingest import tokenize_inputs
from llmt_prep.inputs import Inputs, find_inputs
from llmt_prep.ledger import Ledger, SplitLedger, mistakes, source_ledgers
from llmt_prep.places import place_units, with_formats
from llmt_prep.plan import Plan, describe
from llmt_prep.recipe import recipe_of
from llmt_prep.report import count, percent
from llmt_prep.rows import is_planned, load_rows, write_rows
from llmt_prep.selection import Selected, select, windows_of_splits
from llmt_prep.shards import SplitTask, Totals
from llmt_prep.store import COUNTED, token_dtype
from llmt_prep.tokenizer import LoadedTokenizer, load_tokenizer
from llmt_shared import __version__, durable
from llmt_shared.errors import ConfigError, FormatError
from llmt_shared.manifest import NAME, Manifest, SplitEntry, read_manifest, wrong_files
from llmt_shared.objects import Location, ObjectPath, is_url
from llmt_shared.progress import say, stage

if TYPE_CHECKING:
    from llmt_prep.simulation import Scenario, Simulation


@dataclass(frozen=True)
class Built:
    """A finished dataset."""

    path: Location
    manifest: Manifest
    digest: str
    is_new: bool
    """False where the very same dataset was already there."""


@dataclass
class _Clock:
    """Seconds of each stage, for run.json."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)


def build_dataset(config: MixConfig, *, workers: int | None = None, force: bool = False, rehash: bool = False) -> Built:
    """Make the dataset that a mix describes, or go on making it, or find that it is there.

    Args:
        config: the mix.
        workers: processes; ``None`` takes the mix's, else one for each usable CPU.
        force: replace a finished dataset of another recipe; below a URL none is replaced.
        rehash: read every input file to see whether it changed, even where size, time and inode did not.

    Raises:
        ConfigError: another dataset is there, another run works on it, or the mix cannot work.
        DataError: input that cannot be used.
        FormatError: the dataset that is there is damaged.
        Stopped: the disk is full.
        StoreError: an object store gives no answer.
    """
    output = config.output
    if isinstance(output, Path) and output.is_symlink():  # a rename would replace the link, not what it points at
        config = config.model_copy(update={"output": output.resolve()})
    work = staging.work_of(config.output)
    with staging.locked(work), in_use(cache_of(config)):
        staging.recover(work)
        _check_output(config.output)
        marks = [staging.lock_of(work), lock_of(cache_of(config))]
        with _opened(config, workers, marks) as executor:
            return _build(config, executor, force, rehash)


def dry_run(config: MixConfig, *, workers: int | None = None, rehash: bool = False) -> Plan:
    """Plan without writing: tokens are counted in a temporary directory where the cache does not hold them.

    On a cluster that directory lies where the output would, for all nodes must reach it.
    """
    tokenizer, cache = _tokenizer(config), cache_of(config)
    _tell_of_template(config, tokenizer)
    beside = None if config.executor == "local" else _existing(staging.work_of(config.output).parent)
    with being_read(cache), tempfile.TemporaryDirectory(prefix="llmt-dry-run-", dir=beside) as temporary:
        mark = Path(temporary) / "mark"
        durable.write(mark, temporary)
        with _opened(config, workers, [mark]) as executor:
            inputs = find_inputs(config, cache, executor, rehash=rehash, remember=False)
            corpus = tokenize_inputs(config, inputs, tokenizer, Path(temporary), executor, known=cache)
        return describe(config, corpus, select(config, corpus), token_dtype(tokenizer.max_id))


def simulate(config: MixConfig, scenario: "Scenario", *, workers: int | None = None) -> "Simulation":
    """Say what packing a corpus of another size, on other machines, would give and take; nothing is written.

    Raises:
        ConfigError, DataError: as packing would.
    """
    from llmt_prep import simulation  # loads what packing can do without

    started = time.monotonic()
    tokenizer = _tokenizer(config)
    load_seconds = time.monotonic() - started
    _tell_of_template(config, tokenizer)
    return simulation.simulate(config, tokenizer, scenario, local(workers or config.workers).workers, load_seconds)


def explain_cache(config: MixConfig, *, workers: int | None = None, rehash: bool = False) -> CacheUse:
    """Say what `build_dataset` would take from the cache, and why it would not take the rest.

    Nothing is written but, where there is a cache, the hashes of input files.
    """
    tokenizer, cache = _tokenizer(config), cache_of(config)
    with being_read(cache), _opened(config, workers, [path for path in [lock_of(cache)] if path.exists()]) as executor:
        inputs = find_inputs(config, cache, executor, rehash=rehash, remember=is_cache(cache))
        inexact = inexact_engines(tokenizer_directory(cache, tokenizer.digest))
        return cache_use(config, place_units(config, inputs, tokenizer, cache), inexact, executor)


def units_of(config: MixConfig, *, workers: int | None = None) -> set[str]:
    """Return the keys of the units that a mix is made of, in the cache or not; always found out on this machine."""
    executor = local(workers or config.workers)
    inputs = find_inputs(config, cache_of(config), executor, rehash=False, remember=False)
    places = place_units(config, inputs, _tokenizer(config), cache_of(config))
    return {places.key(number).hex() for number in range(len(places))}


def _build(config: MixConfig, executor: Executor, force: bool, rehash: bool) -> Built:
    clock, started = _Clock(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    tokenizer = _tokenizer(config)
    with clock("hash"):
        inputs = find_inputs(config, cache_of(config), executor, rehash=rehash, remember=True)
    config = with_formats(config, inputs)
    mix = resolved(config, inputs.commits, tokenizer.commit)
    recipe = recipe_of(mix, inputs.files, tokenizer.digest)
    work = staging.work_of(config.output)
    if (done := _finished(config.output, recipe, force=force)) is not None:
        staging.clear(work)  # what a `--force` left that was stopped and is not wanted any more
        return done
    _tell_of_template(config, tokenizer)
    directory, is_resumed = staging.prepare(work, recipe)
    if is_resumed:
        say(f"going on with {directory}")
    with clock("tokenize"):
        corpus = tokenize_inputs(config, inputs, tokenizer, cache_of(config), executor)
    inputs = replace(inputs, units=())  # there may be millions
    check_unchanged(inputs.files)
    with clock("plan"):
        selected = select(config, corpus)
        splits = _plan_rows(config, directory, corpus, selected)
    with clock("gather"):
        dtype = token_dtype(tokenizer.max_id)
        if isinstance(config.output, ObjectPath):
            uploading.claim(config.output, recipe)
        totals = {name: _gather(config, directory, recipe, corpus, name, dtype, executor) for name in splits}
    with clock("finish"):
        ledger = _close_books(config, inputs, corpus, selected, directory, totals)
        data = directory / "data"
        finish.write_companions(data, mix, tokenizer, ledger, inputs.files, corpus)
        header = _header(config, tokenizer, recipe, totals)
        known = {path: sha256 for total in totals.values() for path, sha256 in total.sha256.items()}
        uploaded = {path: size for total in totals.values() for path, size in total.uploaded.items()}
        finish.write_manifest(data, header, known, uploaded)
    durable.write(data / finish.RUN_REPORT, _run_report(started, clock, executor, tokenizer, corpus))
    if isinstance(config.output, ObjectPath):
        uploading.publish(config.output, data)
        staging.clear(work)
    else:
        staging.publish(config.output)
    return Built(config.output, *read_manifest(config.output), is_new=True)


def _opened(config: MixConfig, workers: int | None, marks: Sequence[Path]) -> AbstractContextManager[Executor]:
    """The executor that a mix asks for."""
    workers, ray = workers or config.workers, config.ray
    paths = [path for source in config.sources.values() for path in source.path if not is_url(path)]
    inputs = [_existing(Path(path).expanduser()) for path in paths]
    return opened(config.executor, workers, address=ray.address, memory=ray.memory, marks=marks, inputs=inputs)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there: of a glob, where it starts."""
    return next(each for each in (path, *path.absolute().parents) if os.path.exists(each))


def _tokenizer(config: MixConfig) -> LoadedTokenizer:
    said = config.tokenizer
    tokenizer = load_tokenizer(said.path, said.revision, said.eos_token, said.bos_token)
    if config.kind == "pretrain":
        return tokenizer
    from llmt_prep.chat.settings import with_template  # text needs no templates

    return with_template(config.chat.template, tokenizer)


def _tell_of_template(config: MixConfig, tokenizer: LoadedTokenizer) -> None:
    """Say what the template drops, doubles or refuses, before it does so to a million conversations."""
    if config.kind != "pretrain":
        from llmt_prep.chat.lint import told
        from llmt_prep.chat.template import load_template

        for line in told(load_template(config.chat.template, tokenizer)):
            say(line)


def _check_output(output: Location) -> None:
    """Before hours of work: what cannot be replaced is not written over, with or without force."""
    if isinstance(output, ObjectPath):
        uploading.check_free(output)
        return
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_free and not (output / NAME).exists():
        raise ConfigError(f"{output}: exists and is no dataset; wanted a new directory as `output`")


def _finished(output: Location, recipe: str, *, force: bool) -> Built | None:
    """The dataset where it is there already; an error where another is, or where its files are not whole."""
    if isinstance(output, ObjectPath):
        return _finished_in_store(output, recipe, force=force)
    if force or not (output / NAME).exists():
        return None
    return _sound(output, recipe, "choose another `output`, or --force to replace it")


def _finished_in_store(output: ObjectPath, recipe: str, *, force: bool) -> Built | None:
    if not (output / NAME).exists():
        uploading.check_note(output, recipe)
        return None
    if force:
        raise ConfigError(
            f"{output}: holds a finished dataset, and --force replaces none in a store; {uploading.WAY_OUT}"
        )
    done = _sound(output, recipe, uploading.WAY_OUT)
    uploading.release(output)  # a kill may have come between the manifest and this
    return done


def _sound(output: Location, recipe: str, way_out: str) -> Built:
    manifest, digest = read_manifest(output)
    if manifest.recipe != recipe:
        raise ConfigError(f"{output}: holds a finished dataset made from another mix, input or tokenizer; {way_out}")
    if wrong := wrong_files(output, manifest):
        raise FormatError(f"{wrong[0]}; copy the dataset again, or {way_out}")
    return Built(output, manifest, digest, is_new=False)


def _plan_rows(config: MixConfig, directory: Path, corpus: Corpus, selected: Selected) -> list[str]:
    """Write the row plan of each split that has documents; returns their names."""
    if not corpora.is_saved(corpus, corpora.saved_in(directory)):
        staging.forget_plan(directory)
        corpora.save(corpus, corpora.saved_in(directory))
    windows = windows_of_splits(config, corpus, selected)
    if config.holdout.fraction and "validation" not in windows:
        say(f"no document is held out: {config.holdout.fraction:g} of {corpus.num_documents} documents hit none")
    for name, stream in windows.items():
        if not is_planned(directory / "rows" / name):
            sequence = config.sequence
            write_rows(
                directory / "rows" / name, stream, corpus, sequence.length, sequence.overflow, config.packing.carry
            )
    return [name for name in windows if load_rows(directory / "rows" / name).num_rows]  # `drop` may leave none


def _gather(
    config: MixConfig,
    directory: Path,
    recipe: str,
    corpus: Corpus,
    split: str,
    dtype: np.dtype[Any],
    executor: Executor,
) -> Totals:
    num_rows, length = load_rows(directory / "rows" / split).num_rows, config.sequence.length
    per_shard = shards.rows_per_shard(num_rows, length, dtype.itemsize, config.shard_size)
    store = config.output if isinstance(config.output, ObjectPath) else None
    task = SplitTask(
        staging=str(directory),
        split=split,
        num_sources=corpus.num_sources,
        length=length,
        rows_per_shard=per_shard,
        dtype=dtype.name,
        seed=config.seed,
        kind=config.kind,
        recipe=recipe,
        store=store,
    )
    missing = shards.unwritten(task, shards.num_shards(num_rows, per_shard))
    with stage(f"{split} shards", len(missing)) as advance:
        for _ in executor.run(shards.write_shard, ((task, number) for number in missing)):
            advance(1)
    return shards.finish_split(task)


def _close_books(
    config: MixConfig, inputs: Inputs, corpus: Corpus, selected: Selected, directory: Path, totals: dict[str, Totals]
) -> Ledger:
    planned = [name for name in ("train", "validation") if is_planned(directory / "rows" / name)]
    tallies = {name: load_rows(directory / "rows" / name).tallies for name in planned}
    nothing = [0] * corpus.num_sources  # in the rows of a split that has none
    in_rows = {name: totals[name].tokens_of_source if name in totals else nothing for name in planned}
    files = Counter(file.source for file in inputs.files)
    ledger = Ledger(
        sources=source_ledgers(config, corpus, selected, files, tallies, in_rows),
        splits={
            name: SplitLedger(
                rows=total.rows, in_rows=total.tokens, padding=total.rows * config.sequence.length - total.tokens
            )
            for name, total in totals.items()
        },
    )
    wrong = mistakes(ledger, config.sequence.length)
    assert not wrong, f"the ledger does not close: {wrong}"
    return ledger


def _header(config: MixConfig, tokenizer: LoadedTokenizer, recipe: str, totals: dict[str, Totals]) -> dict[str, Any]:
    return {
        "kind": config.kind,
        "length": config.sequence.length,
        "sources": tuple(config.sources),
        "tokenizer": finish.tokenizer_entry(tokenizer),
        "recipe": recipe,
        "splits": {
            name: {key: getattr(total, key) for key in SplitEntry.model_fields} for name, total in totals.items()
        },
    }


def _run_report(started: str, clock: _Clock, executor: Executor, tokenizer: LoadedTokenizer, corpus: Corpus) -> str:
    """What neither the manifest nor the digest covers; of units, those of earlier runs too, where they were reused."""
    packages = ("numpy", "tokenizers", "fastokens", "pyarrow", "numba")
    counted = dict(zip(COUNTED, corpus.counts.sum(axis=0).tolist(), strict=True))
    report = {
        "started": started,
        "seconds": clock.seconds,
        **executor.report(),
        "units_by_engine": corpus.engines,
        "guard": {
            "documents_compared": counted["compared"],
            "batches_fallen_back": counted["fallbacks"],
        },
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {"llmt": __version__} | {name: _version(name) for name in packages},
        "tokenizer_commit": tokenizer.commit,
    }
    return json.dumps(report, indent=1) + "\n"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # numba and fastokens are not there for every Python and machine
        return None


def summary(built: Built, as_json: bool) -> str:
    """Return what `pack` prints at its end."""
    manifest = built.manifest
    if as_json:
        splits = {name: split.model_dump() for name, split in manifest.splits.items()}
        return json.dumps({"path": str(built.path), "digest": built.digest, "new": built.is_new, "splits": splits})
    lines = [
        f"{name}: {count(split.rows)} rows of {manifest.length}, {count(split.tokens)} tokens, "
        f"{percent(split.tokens / max(1, split.rows * manifest.length))} full"
        for name, split in manifest.splits.items()
    ]
    state = "" if built.is_new else " (was there already)"
    return "\n".join([*lines, f"{built.path}{state}, digest {built.digest}"])
