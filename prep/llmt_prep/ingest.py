"""From input files to the corpus: every unit of work is tokenized once and found again by its content.

A unit's name in the cache is the hash of what its tokens depend on: the file's content, the range, the reader, the
tokenizer and how documents begin and end. So another row length, mixture or seed tokenizes nothing again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmt_prep import documents, executor
from llmt_prep.choice import Choice, choose_engine
from llmt_prep.config import MixConfig, tolerated
from llmt_prep.corpus import Corpus, UnitEntry
from llmt_prep.documents import Reading, Unit
from llmt_prep.engines import Engine, fast_engine
from llmt_prep.guard import EngineDiffers, distrust
from llmt_prep.inputs import InputFile, Inputs, check_unchanged, read_index, reading_of, write_index
from llmt_prep.progress import say, stage
from llmt_prep.report import escaped
from llmt_prep.store import UnitMeta, open_unit, read_quarantine
from llmt_prep.tokenization import TextSettings, hash_content, tokenize_unit, unit_key
from llmt_prep.tokenizer import LoadedTokenizer, load_tokenizer
from llmt_shared import durable
from llmt_shared.errors import DataError

_MANY_BAD = 100
"""Bad records before a share of them may stop a run in the middle."""


@dataclass(frozen=True)
class TokenizeTask:
    """One unit to tokenize; picklable and small."""

    unit: Unit
    reading: Reading
    settings: TextSettings
    tokenizer: tuple[str, str | None, str | None]
    """Folder, EOS token and BOS token."""
    directory: str
    file: InputFile
    """Where the unit lies, as it was when it was hashed."""
    is_fast: bool
    """Tokenized by the fast engine, guarded by the reference."""
    begins_source: bool
    """Whether the guard looks at its first documents, too."""


@dataclass(frozen=True)
class _Place:
    """Where a unit belongs and where its tokens are or will be."""

    file: int
    source: int
    unit: Unit
    directory: Path
    begins_source: bool


def tokenize_inputs(
    config: MixConfig,
    inputs: Inputs,
    tokenizer: LoadedTokenizer,
    cache: Path,
    workers: int,
    known: Path | None = None,
) -> Corpus:
    """Tokenize what the cache does not hold.

    Args:
        config: the mix.
        inputs: hashed files.
        tokenizer: loaded tokenizer.
        cache: where units are written.
        workers: processes.
        known: another cache, which is only read.

    Raises:
        DataError: more bad records than `max_bad`, damaged input.
    """
    folder = _shelve_tokenizer(cache, tokenizer)
    settings, said = _settings(config), config.tokenizer
    places = _places(config, inputs, tokenizer, settings, (cache, known or cache), workers)
    _tokenize_missing(config, inputs, places, (str(folder), said.eos_token, said.bos_token), workers)
    metas = [open_unit(place.directory).meta for place in places]
    _check_bad(config, inputs, places, metas, np.ones(len(config.sources)))
    return _corpus(inputs.files, places, metas, len(config.sources))


def run_task(task: TokenizeTask) -> UnitMeta:
    """Tokenize one unit; in any process.

    A unit's name says what its file held when it was hashed: of a file that has changed since, none may appear.
    """
    tokenizer = _loaded(*task.tokenizer)
    keep_control = task.settings.special_tokens_in_text == "keep"
    fast = _fast(task.tokenizer, keep_control) if task.is_fast else None
    check = partial(check_unchanged, (task.file,))
    try:
        return tokenize_unit(
            task.unit, task.reading, tokenizer, task.settings, Path(task.directory), check, fast, task.begins_source
        )
    except EngineDiffers as difference:
        distrust(Path(task.tokenizer[0]), difference.engine)
        raise


@lru_cache(maxsize=1)
def _fast(tokenizer: tuple[str, str | None, str | None], keep_control: bool) -> Engine:
    return fast_engine(_loaded(*tokenizer), keep_control=keep_control)


@lru_cache(maxsize=1)
def _loaded(folder: str, eos_token: str | None, bos_token: str | None) -> LoadedTokenizer:
    return load_tokenizer(folder, None, eos_token, bos_token)


def _settings(config: MixConfig) -> TextSettings:
    return TextSettings(special_tokens_in_text=config.special_tokens_in_text, bos=config.bos, eos=config.eos)


def _shelve_tokenizer(cache: Path, tokenizer: LoadedTokenizer) -> Path:
    """Put the tokenizer's files where every worker can load them."""
    folder = cache / "tokenizers" / tokenizer.digest[:32]
    for name, content in tokenizer.files.items():
        if not (folder / name).exists():
            durable.write(folder / name, content)
    return folder


def _places(
    config: MixConfig,
    inputs: Inputs,
    tokenizer: LoadedTokenizer,
    settings: TextSettings,
    caches: tuple[Path, Path],
    workers: int,
) -> list[_Place]:
    """Every unit with its folder: in the second cache where that holds it, else in the first."""
    readings = [reading_of(config, source) for source in config.sources.values()]
    units = [
        (index, unit)
        for index, file in enumerate(inputs.files)
        for unit in documents.split_into_units(Path(file.path), readings[file.source].reader, config.unit_size)
    ]
    hashes = _unit_hashes([(unit, inputs.files[index]) for index, unit in units], caches, workers)
    places = []
    seen: set[int] = set()
    for (index, unit), content in zip(units, hashes, strict=True):
        source = inputs.files[index].source
        key = unit_key(unit, content, readings[source], tokenizer, settings)
        folders = [cache / "units" / key[:2] / key for cache in caches]
        folder = folders[1] if folders[1].exists() else folders[0]
        places.append(_Place(index, source, unit, folder, begins_source=source not in seen))
        seen.add(source)
    return places


def _unit_hashes(units: Sequence[tuple[Unit, InputFile]], caches: tuple[Path, Path], workers: int) -> list[str]:
    """Hashes of what each unit reads: where a file grew, those of its old units stay as they were."""
    known = read_index(caches[1] / "units.json")
    names = [f"{file.sha256}|{unit.reader}|{unit.start}|{unit.stop}" for unit, file in units]
    missing = [i for i, name in enumerate(names) if name not in known]
    for done, content in executor.run(hash_unit, [units[i] for i in missing], workers):
        known[names[missing[done]]] = content
    if missing:
        write_index(caches[0] / "units.json", known)
    return [known[name] for name in names]


def hash_unit(unit: Unit, file: InputFile) -> str:
    """Hash what a unit reads; in any process."""
    content = hash_content(unit)
    check_unchanged((file,))
    return content


def _tokenize_missing(
    config: MixConfig,
    inputs: Inputs,
    places: Sequence[_Place],
    tokenizer: tuple[str, str | None, str | None],
    workers: int,
) -> None:
    missing = {place.directory: place for place in places if not place.directory.exists()}
    todo = list(missing.values())
    is_fast = bool(todo) and _chosen(config, tokenizer).is_fast
    tasks = [(_task(config, inputs.files[place.file], place, tokenizer, is_fast),) for place in todo]
    sizes = [_size(place.unit, inputs.files[place.file]) for place in todo]
    in_all = np.bincount([place.source for place in todo], sizes, len(config.sources))
    read = np.zeros(len(config.sources))
    seen: list[tuple[_Place, UnitMeta]] = []
    with stage("tokenize", sum(sizes), "bytes") as advance:
        for done, meta in executor.run(run_task, tasks, workers):
            advance(sizes[done])
            seen.append((todo[done], meta))
            read[todo[done].source] += sizes[done]
            if meta.quarantined >= _MANY_BAD:  # a wrong field must not cost a night
                done_places, metas = zip(*seen, strict=True)
                _check_bad(config, inputs, done_places, metas, in_all / np.maximum(read, 1))


def _task(
    config: MixConfig, file: InputFile, place: _Place, tokenizer: tuple[str, str | None, str | None], is_fast: bool
) -> TokenizeTask:
    reading = reading_of(config, list(config.sources.values())[place.source])
    settings, directory = _settings(config), str(place.directory)
    return TokenizeTask(
        place.unit, reading, settings, tokenizer, directory, file, is_fast, begins_source=place.begins_source
    )


def _chosen(config: MixConfig, tokenizer: tuple[str, str | None, str | None]) -> Choice:
    keep_control = config.special_tokens_in_text == "keep"
    choice = choose_engine(config.engine, _loaded(*tokenizer), keep_control=keep_control, folder=Path(tokenizer[0]))
    if config.engine == "auto" and not choice.is_fast:
        say(f"engine: tokenizers, because {choice.reason}")
    return choice


def _size(unit: Unit, file: InputFile) -> int:
    return min(unit.stop - unit.start, file.bytes) if unit.reader != "parquet" else file.bytes


def _check_bad(
    config: MixConfig,
    inputs: Inputs,
    places: Sequence[_Place],
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
            raise DataError(
                f"sources.{name}: {bad} of {records} records cannot be used; max_bad allows {config.max_bad}. "
                f"The first are:\n{lines}\nMend them, set text_field or reader, or raise max_bad: "
                f"bad records are then left out and listed in quarantine.jsonl"
            )


def _examples(inputs: Inputs, places: Sequence[_Place], most: int = 3) -> str:
    lines: list[str] = []
    for place in places:
        before = documents.lines_before(place.unit)
        for bad in read_quarantine(place.directory):
            line = before + bad.record + 1
            lines.append(f"  {inputs.files[place.file].name}:{line}: {bad.reason}: {escaped(bad.preview[:60])}")
            if len(lines) == most:
                return "\n".join(lines)
    return "\n".join(lines)


def _corpus(
    files: Sequence[InputFile], places: Sequence[_Place], metas: Sequence[UnitMeta], num_sources: int
) -> Corpus:
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
        )
        for place, meta, before in zip(places, metas, records_before, strict=True)
    )
    return Corpus(units, num_sources)
