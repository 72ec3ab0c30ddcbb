"""From input files to the corpus: every unit of work is tokenized once and found again by its content.

A unit's name in the cache is the hash of what its tokens depend on: the file's content, the range, the reader, the
tokenizer and how documents begin and end. So another row length, mixture or seed tokenizes nothing again.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmt_prep import documents, store
from llmt_prep.cache import tokenizer_directory
from llmt_prep.choice import Choice, choose_engine
from llmt_prep.config import MixConfig, tolerated
from llmt_prep.corpus import Corpus, Counting, close_units
from llmt_prep.executor import HERE, Executor
from llmt_prep.guard import inexact_engines
from llmt_prep.hashes import IN_PROCESS_BYTES
from llmt_prep.held import Shelved, hold
from llmt_prep.inputs import Inputs, InputUnit
from llmt_prep.places import Places, place_units
from llmt_prep.store import open_unit, read_quarantine, unit_folder
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_prep.unit_task import TokenizeTask, run_task
from llmt_shared import durable
from llmt_shared.errors import DataError
from llmt_shared.objects import is_url
from llmt_shared.progress import say, stage
from llmt_shared.terminal import escaped

_MANY_BAD = 100
"""Bad records before a share of them may stop a run in the middle."""


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
    places = place_units(config, inputs, tokenizer, cache, known)
    inexact = inexact_engines(tokenizer_directory(known or cache, tokenizer.digest))
    _settle(places, unusable_units(places, inexact, executor), inexact)
    counting = Counting(places.units, len(config.sources))
    _tokenize_missing(places, shelved, inexact, executor, counting)
    _check_bad(places, counting, np.ones(len(config.sources)))
    files = inputs.files
    return counting.corpus(
        places.folders, [file.source for file in files], [file.name for file in files], places.first_unit
    )


def unusable_units(places: Places, inexact: frozenset[str], executor: Executor) -> dict[bytes, str]:
    """Return the keys of units that are there but must not be used, and what to say; it reads all units.

    Args:
        places: where units are.
        inexact: engines that were found wrong for the tokenizer.
        executor: reads, where there is much to read.
    """
    there = np.flatnonzero(places.are_first() & places.are_there())
    total = sum(places.size(int(number)) for number in there)
    unusable: dict[bytes, str] = {}
    with stage("check cache", total, "bytes") as advance:
        tasks = ((places.directory(int(number)),) for number in there)
        for done, is_sound in (executor if total > IN_PROCESS_BYTES else HERE).run(store.is_sound, tasks):
            number = int(there[done])
            advance(places.size(number))
            if not is_sound:
                unusable[places.key(number)] = "is damaged"
            elif inexact and (engine := open_unit(places.directory(number)).meta.engine) in inexact:
                unusable[places.key(number)] = f"was made by {engine}, which is not exact"
    return unusable


def shelve_tokenizer(config: MixConfig, cache: Path, tokenizer: LoadedTokenizer) -> Shelved:
    """Put the tokenizer's files where every worker can load them, and hold it in this process."""
    folder = tokenizer_directory(cache, tokenizer.digest)
    for name, content in tokenizer.files.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            durable.write(folder / name, content)
    shelved = Shelved(str(folder), config.tokenizer.eos_token, config.tokenizer.bos_token)
    hold(shelved, tokenizer)
    return shelved


def _settle(places: Places, unusable: Mapping[bytes, str], inexact: frozenset[str]) -> None:
    """Say of what is not there, or cannot be used, that it is, or will be, where units are written."""
    for key, reason in sorted(unusable.items()):
        path = unit_folder(places.folders[-1], key.hex())
        say(f"{path}: this unit of the cache {reason}; it is tokenized again")
        is_made_again = store.is_sound(path) and open_unit(path).meta.engine not in inexact  # by another run, meanwhile
        if len(places.folders) == 1 and not is_made_again:
            store.remove_unit(path)
            close_units()
    is_there = places.are_there()
    for number in range(len(places)):
        if not is_there[number] or places.key(number) in unusable:
            places.units["folder"][number] = 0
        elif places.units["folder"][number] == 0:
            with suppress(OSError):  # another user's unit is used all the same
                os.utime(places.directory(number))  # `cache prune` goes by when a unit was last used


def _tokenize_missing(
    places: Places, tokenizer: Shelved, inexact: frozenset[str], executor: Executor, counting: Counting
) -> None:
    """Make what is not there, and count all."""
    is_there = places.are_there()
    todo = np.flatnonzero(~is_there & places.are_first())
    is_fast = len(todo) > 0 and _chosen(places.config, tokenizer, inexact).is_fast
    read = np.zeros(len(places.bytes_of_source), np.int64)
    for number in map(int, np.flatnonzero(is_there)):  # not `tolist`, which takes 36 bytes for each
        counting.add(number, open_unit(places.directory(number)).meta)
        read[places.units["source"][number]] += places.size(number)
    tasks = ((task,) for task in _tasks(places, todo, tokenizer, is_fast, executor))
    with stage("tokenize", sum(places.size(int(number)) for number in todo), "bytes") as advance:
        for done, meta in executor.run(run_task, tasks):
            number = int(todo[done])
            advance(places.size(number))
            counting.add(number, meta)
            read[places.units["source"][number]] += places.size(number)
            if meta.quarantined >= _MANY_BAD:  # a wrong field must not cost a night
                _check_bad(places, counting, places.bytes_of_source / np.maximum(read, 1))
    for number in map(int, np.flatnonzero(~counting.is_added)):  # the same as others
        counting.add(number, open_unit(places.directory(number)).meta)


def _tasks(
    places: Places, todo: NDArray[np.int64], tokenizer: Shelved, is_fast: bool, executor: Executor
) -> Iterator[TokenizeTask]:
    """Each with what its worker is likely to be given next; of several machines that is not known."""
    distance = executor.workers if len(todo) > 1 and executor.hosts == 1 else len(todo)
    for index, number in enumerate(map(int, todo)):
        after = places.inputs.units[int(todo[index + distance])] if index + distance < len(todo) else None
        yield _task(places, number, after, tokenizer, is_fast)


def _chosen(config: MixConfig, tokenizer: Shelved, inexact: frozenset[str]) -> Choice:
    keep_control = config.kind != "pretrain" or config.special_tokens_in_text == "keep"
    choice = choose_engine(config.engine, tokenizer, keep_control=keep_control, inexact=inexact)
    if config.engine == "auto" and not choice.is_fast:
        say(f"engine: tokenizers, because {choice.reason}")
    return choice


def _task(places: Places, number: int, after: InputUnit | None, tokenizer: Shelved, is_fast: bool) -> TokenizeTask:
    place = places[number]
    return TokenizeTask(
        unit=place.unit,
        reading=places.readings[place.source],
        settings=place.settings,
        tokenizer=tokenizer,
        is_fast=is_fast,
        begins_source=place.begins_source,
        directory=str(place.directory),
        file=places.inputs.files[place.file],
        origin=place.origin,
        ahead=(after.unit.path, *after.span) if after and not is_url(after.unit.path) else None,
    )


def _check_bad(places: Places, counting: Counting, growth: NDArray[np.float64]) -> None:
    """Raise when a source has too many bad records, of those that are counted.

    ``growth`` says of each source how many times as many records there are in all, as far as bytes tell: what comes
    first may be bad though the whole is not, and whether a run stops must not depend on which worker is first.
    """
    config = places.config
    for source, name in enumerate(config.sources):
        records, bad = (counting.of_source(source, key) for key in ("records", "quarantined"))
        if bad > tolerated(config.max_bad, int(records * growth[source])):
            settings = "text_field or reader" if config.kind == "pretrain" else "format, fields or chat.template"
            raise DataError(
                f"sources.{name}: {bad} of {records} records cannot be used; max_bad allows {config.max_bad}. "
                f"The first are:\n{_examples(places, source)}\nMend them, set {settings}, or raise max_bad: "
                f"bad records are then left out and listed in quarantine.jsonl"
            )


def _examples(places: Places, source: int, most: int = 3) -> str:
    lines: list[str] = []
    for number in map(int, np.flatnonzero(places.units["bad"] & (places.units["source"] == source))):
        each = places.inputs.units[number]
        before = documents.lines_before(each.unit)
        for bad in read_quarantine(places.directory(number)):
            line = before + bad.record + 1
            lines.append(f"  {places.inputs.files[each.file].name}:{line}: {bad.reason}: {escaped(bad.preview[:60])}")
            if len(lines) == most:
                return "\n".join(lines)
    return "\n".join(lines)
