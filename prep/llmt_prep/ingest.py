"""From input files to the corpus: every unit of work is tokenized once and found again by its content.

A unit's name in the cache is the hash of what its tokens depend on: the file's content, the range, the reader, the
tokenizer and how documents begin and end. So another row length, mixture or seed tokenizes nothing again.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmt_prep import documents, store
from llmt_prep.cache import Origin, tokenizer_directory, unit_directory
from llmt_prep.choice import Choice, choose_engine
from llmt_prep.config import MixConfig, tolerated
from llmt_prep.corpus import Corpus, UnitEntry, close_units
from llmt_prep.documents import Unit
from llmt_prep.executor import HERE, Executor
from llmt_prep.guard import inexact_engines
from llmt_prep.hashes import IN_PROCESS_BYTES
from llmt_prep.held import Shelved, hold
from llmt_prep.inputs import InputFile, Inputs, reading_of
from llmt_prep.store import UnitMeta, open_unit, read_quarantine
from llmt_prep.tokenization import TextSettings, unit_facts, unit_key
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_prep.unit_task import TokenizeTask, run_task
from llmt_shared import durable
from llmt_shared.errors import DataError
from llmt_shared.objects import is_url
from llmt_shared.progress import say, stage
from llmt_shared.terminal import escaped

if TYPE_CHECKING:
    from llmt_prep.chat.prepare import ChatSettings

_MANY_BAD = 100
"""Bad records before a share of them may stop a run in the middle."""


@dataclass(frozen=True)
class Place:
    """Where a unit belongs and where its tokens are or will be."""

    file: int
    """Index of the input file."""
    source: int
    unit: Unit
    span: tuple[int, int]
    """Bytes of the file that the unit reads, about."""
    settings: "TextSettings | ChatSettings"
    origin: Origin
    directory: Path
    begins_source: bool
    """Whether it is the first unit of its source."""

    @property
    def bytes(self) -> int:
        """Bytes of input, about."""
        return self.span[1] - self.span[0]


def tokenize_inputs(
    config: MixConfig,
    inputs: Inputs,
    tokenizer: LoadedTokenizer,
    cache: Path,
    executor: Executor,
    known: Path | None = None,
) -> Corpus:
    """Tokenize what the cache does not hold.

    Args:
        config: the mix.
        inputs: hashed files.
        tokenizer: loaded tokenizer.
        cache: where units are written.
        executor: tokenizes.
        known: another cache, which is only read.

    Raises:
        DataError: more bad records than `max_bad`, damaged input.
    """
    shelved = shelve_tokenizer(config, cache, tokenizer)
    places = place_units(config, inputs, tokenizer, known or cache)
    inexact = inexact_engines(tokenizer_directory(known or cache, tokenizer.digest))
    places = _reusable(places, cache, unusable_units(places, inexact, executor), inexact)
    _tokenize_missing(config, inputs, places, shelved, inexact, executor)
    metas = [open_unit(place.directory).meta for place in places]
    _check_bad(config, inputs, places, metas, np.ones(len(config.sources)))
    return _corpus(inputs.files, places, metas, len(config.sources))


def place_units(config: MixConfig, inputs: Inputs, tokenizer: LoadedTokenizer, cache: Path) -> list[Place]:
    """Return where a cache holds each unit of the input, or would hold it; equal units share a folder."""
    settings = _settings(config, inputs, tokenizer)
    readings = [reading_of(config, source) for source in config.sources.values()]
    places: list[Place] = []
    for each in inputs.units:
        file = inputs.files[each.file]
        facts = unit_facts(each.unit, each.content, readings[file.source], tokenizer, settings[file.source])
        origin = Origin(facts, _full_name(file), file.sha256, config.unit_size, config.tokenizer.path)
        directory = unit_directory(cache, unit_key(facts))
        begins_source = not places or places[-1].source != file.source
        mine = settings[file.source]
        places.append(Place(each.file, file.source, each.unit, each.span, mine, origin, directory, begins_source))
    return places


def unusable_units(places: Iterable[Place], inexact: frozenset[str], executor: Executor) -> dict[Path, str]:
    """Return the folders of units that are there but must not be used, and what to say; it reads all units.

    Args:
        places: where units are.
        inexact: engines that were found wrong for the tokenizer.
        executor: reads, where there is much to read.
    """
    there = {place.directory: place.bytes for place in places if place.directory.exists()}
    folders, total = list(there), sum(there.values())
    unusable: dict[Path, str] = {}
    with stage("check cache", total, "bytes") as advance:
        tasks = ((folder,) for folder in folders)
        for done, is_sound in (executor if total > IN_PROCESS_BYTES else HERE).run(store.is_sound, tasks):
            folder = folders[done]
            advance(there[folder])
            if not is_sound:
                unusable[folder] = "is damaged"
            elif inexact and (engine := open_unit(folder).meta.engine) in inexact:
                unusable[folder] = f"was made by {engine}, which is not exact"
    return unusable


def _settings(
    config: MixConfig, inputs: Inputs, tokenizer: LoadedTokenizer
) -> "Sequence[TextSettings] | Sequence[ChatSettings]":
    """Of each source."""
    if config.kind == "pretrain":
        text = TextSettings(special_tokens_in_text=config.special_tokens_in_text, bos=config.bos, eos=config.eos)
        return [text] * len(config.sources)
    from llmt_prep.chat.settings import chat_settings, with_formats  # text needs no templates

    return chat_settings(with_formats(config, inputs), tokenizer)


def shelve_tokenizer(config: MixConfig, cache: Path, tokenizer: LoadedTokenizer) -> Shelved:
    """Put the tokenizer's files where every worker can load them, and hold it in this process."""
    folder = tokenizer_directory(cache, tokenizer.digest)
    for name, content in tokenizer.files.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            durable.write(folder / name, content)
    shelved = Shelved(str(folder), config.tokenizer.eos_token, config.tokenizer.bos_token)
    hold(shelved, tokenizer)
    return shelved


def _full_name(file: InputFile) -> str:
    return documents.full_name(file.path) if file.name == file.path else file.name


def _reusable(
    places: Sequence[Place], cache: Path, unusable: Mapping[Path, str], inexact: frozenset[str]
) -> list[Place]:
    """The places, with what is not there, or cannot be used, in the cache that is written."""
    for path, reason in sorted(unusable.items()):
        say(f"{path}: this unit of the cache {reason}; it is tokenized again")
        is_made_again = store.is_sound(path) and open_unit(path).meta.engine not in inexact  # by another run, meanwhile
        if path == unit_directory(cache, path.name) and not is_made_again:
            store.remove_unit(path)
            close_units()
    return [_used_or_moved(place, cache, unusable) for place in places]


def _used_or_moved(place: Place, cache: Path, unusable: Mapping[Path, str]) -> Place:
    own = unit_directory(cache, place.directory.name)
    if place.directory in unusable or not place.directory.exists():
        return replace(place, directory=own)
    if place.directory == own:
        with suppress(OSError):  # another user's unit is used all the same
            os.utime(own)  # `cache prune` goes by when a unit was last used
    return place


def _tokenize_missing(
    config: MixConfig,
    inputs: Inputs,
    places: Sequence[Place],
    tokenizer: Shelved,
    inexact: frozenset[str],
    executor: Executor,
) -> None:
    missing = {place.directory: place for place in places if not place.directory.exists()}
    todo = list(missing.values())
    is_fast = bool(todo) and _chosen(config, tokenizer, inexact).is_fast
    tasks = (
        (_task(config, inputs.files[place.file], place, after, tokenizer, is_fast),)
        for place, after in zip(todo, _ahead(todo, executor), strict=True)
    )
    sizes = [place.bytes for place in todo]
    seen = [(place, open_unit(place.directory).meta) for place in places if place.directory not in missing]
    in_all = _bytes_by_source(places, len(config.sources))
    read = _bytes_by_source([place for place, _ in seen], len(config.sources))
    with stage("tokenize", sum(sizes), "bytes") as advance:
        for done, meta in executor.run(run_task, tasks):
            advance(sizes[done])
            seen.append((todo[done], meta))
            read[todo[done].source] += sizes[done]
            if meta.quarantined >= _MANY_BAD:  # a wrong field must not cost a night
                done_places, metas = zip(*seen, strict=True)
                _check_bad(config, inputs, done_places, metas, in_all / np.maximum(read, 1))


def _ahead(todo: Sequence[Place], executor: Executor) -> Iterator[Place | None]:
    """What the worker of each place is likely to be given next; of several machines that is not known."""
    distance = executor.workers if len(todo) > 1 and executor.hosts == 1 else len(todo)
    return chain(islice(todo, distance, None), repeat(None, min(distance, len(todo))))


def _chosen(config: MixConfig, tokenizer: Shelved, inexact: frozenset[str]) -> Choice:
    keep_control = config.kind != "pretrain" or config.special_tokens_in_text == "keep"
    choice = choose_engine(config.engine, tokenizer, keep_control=keep_control, inexact=inexact)
    if config.engine == "auto" and not choice.is_fast:
        say(f"engine: tokenizers, because {choice.reason}")
    return choice


def _bytes_by_source(places: Sequence[Place], num_sources: int) -> NDArray[np.float64]:
    sizes = np.array([place.bytes for place in places], np.float64)
    return np.bincount([place.source for place in places], sizes, num_sources).astype(np.float64)


def _task(
    config: MixConfig,
    file: InputFile,
    place: Place,
    after: Place | None,
    tokenizer: Shelved,
    is_fast: bool,
) -> TokenizeTask:
    return TokenizeTask(
        unit=place.unit,
        reading=reading_of(config, list(config.sources.values())[place.source]),
        settings=place.settings,
        tokenizer=tokenizer,
        is_fast=is_fast,
        begins_source=place.begins_source,
        directory=str(place.directory),
        file=file,
        origin=place.origin,
        ahead=(after.unit.path, *after.span) if after and not is_url(after.unit.path) else None,
    )


def _check_bad(
    config: MixConfig,
    inputs: Inputs,
    places: Sequence[Place],
    metas: Sequence[UnitMeta],
    growth: NDArray[np.float64],
) -> None:
    """Raise when a source has too many bad records.

    ``growth`` says of each source how many times as many records there are in all, as far as bytes tell: what comes
    first may be bad though the whole is not, and whether a run stops must not depend on which worker is first.
    """
    for source, name in enumerate(config.sources):
        mine = [(place, meta) for place, meta in zip(places, metas, strict=True) if place.source == source]
        records, bad = (sum(getattr(meta, key) for _, meta in mine) for key in ("records", "quarantined"))
        if bad > tolerated(config.max_bad, int(records * growth[source])):
            lines = _examples(inputs, [place for place, meta in mine if meta.quarantined])
            settings = "text_field or reader" if config.kind == "pretrain" else "format, fields or chat.template"
            raise DataError(
                f"sources.{name}: {bad} of {records} records cannot be used; max_bad allows {config.max_bad}. "
                f"The first are:\n{lines}\nMend them, set {settings}, or raise max_bad: "
                f"bad records are then left out and listed in quarantine.jsonl"
            )


def _examples(inputs: Inputs, places: Sequence[Place], most: int = 3) -> str:
    lines: list[str] = []
    for place in places:
        before = documents.lines_before(place.unit)
        for bad in read_quarantine(place.directory):
            line = before + bad.record + 1
            lines.append(f"  {inputs.files[place.file].name}:{line}: {bad.reason}: {escaped(bad.preview[:60])}")
            if len(lines) == most:
                return "\n".join(lines)
    return "\n".join(lines)


def _corpus(files: Sequence[InputFile], places: Sequence[Place], metas: Sequence[UnitMeta], num_sources: int) -> Corpus:
    lines_of_file = np.zeros(len(files), np.int64)
    records_before = []
    for place, meta in zip(places, metas, strict=True):
        records_before.append(int(lines_of_file[place.file]))
        lines_of_file[place.file] += meta.lines
    file_document = (np.cumsum(lines_of_file) - lines_of_file).tolist()
    units = tuple(
        UnitEntry(
            directory=str(place.directory.absolute()),
            source=place.source,
            path=files[place.file].name,
            documents=meta.documents,
            tokens=meta.tokens,
            file_document=file_document[place.file],
            records_before=before,
            has_targets=meta.has_targets,
            content=meta.content,
        )
        for place, meta, before in zip(places, metas, records_before, strict=True)
    )
    return Corpus(units, num_sources)
