"""Which files a mix reads, what they hold (by hash), and the units of work that they fall into."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple, SupportsIndex, overload

import numpy as np

from llmt_prep import documents
from llmt_prep.config import MixConfig, SourceConfig
from llmt_prep.documents import FileStat, Reading, Unit, full_name
from llmt_prep.executor import Executor
from llmt_prep.hashes import FileHashes, Job, hash_inputs
from llmt_prep.staging import staging_of, work_of
from llmt_shared.errors import ConfigError
from llmt_shared.objects import is_url

HASHES = "hashes"
"""Name of the index in the cache."""


@dataclass(frozen=True, slots=True)
class InputFile(FileStat):
    """One file of one source."""

    source: int
    name: str
    """What the dataset calls it: path or URL, or ``hf://id/split/file``, for where a hub's cache lies says nothing."""
    sha256: str


class InputUnit(NamedTuple):
    """One unit of one file."""

    file: int
    """Index in `Inputs.files`."""
    unit: Unit
    content: str
    """What `hash_content` says of it."""
    span: tuple[int, int]
    """Bytes of the file that it reads, about."""


@dataclass(frozen=True)
class Inputs:
    """All files of a mix in the order of its sources, their units, and the commits of hub datasets by source name."""

    files: tuple[InputFile, ...]
    units: Sequence[InputUnit]
    """In the order of files and of places in them."""
    commits: dict[str, str]


class HashedUnits(Sequence[InputUnit]):
    """The units of files, 32 bytes each: what is said of one is put together when it is asked for."""

    def __init__(self, jobs: Sequence[Job], hashes: Sequence[FileHashes]) -> None:
        """``hashes`` are those of ``jobs``, one by one."""
        self._jobs, self._hashes = jobs, hashes
        self._first = np.cumsum([0, *(each.num_units for each in hashes)])

    def __len__(self) -> int:
        """All of them."""
        return int(self._first[-1])

    @overload
    def __getitem__(self, index: SupportsIndex) -> InputUnit: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[InputUnit, ...]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> InputUnit | tuple[InputUnit, ...]:
        """The unit of this number."""
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        number = range(len(self))[index]
        file = int(np.searchsorted(self._first, number, "right")) - 1
        return self._unit(file, number - int(self._first[file]))

    def __iter__(self) -> Iterator[InputUnit]:
        """Yield each, which is faster than asking for it."""
        for file, each in enumerate(self._hashes):
            for number in range(each.num_units):
                yield self._unit(file, number)

    def _unit(self, file: int, number: int) -> InputUnit:
        job, hashes = self._jobs[file], self._hashes[file]
        start, stop, content = hashes.unit(number)
        unit = Unit(job.file.path, job.reader, start, stop)
        return InputUnit(file, unit, content, span_of(unit, job.file.bytes, number, hashes.num_units))


def reading_of(config: MixConfig, source: SourceConfig) -> Reading:
    """Return a source's reader settings."""
    return Reading(
        reader="arrow" if source.hf else source.reader,
        text_field=source.text_field if config.kind == "pretrain" else None,
        record=source.record,
        max_record_bytes=config.max_record_bytes,
    )


def find_inputs(config: MixConfig, cache: Path, executor: Executor, *, rehash: bool, remember: bool) -> Inputs:
    """Find all input files, cut them into units, and hash both.

    Args:
        config: the mix.
        cache: the folder in which the hashes of unchanged files are remembered.
        executor: hashes, where there is much to read.
        rehash: hash even files whose size, time and inode are as remembered.
        remember: write down what was hashed.

    Raises:
        ConfigError: a pattern matches nothing, a file cannot be read, or it is one that packing itself writes.
        DataError: a file is broken, or changes while it is read.
    """
    files, commits = list_files(config, cache)
    readings = [reading_of(config, source) for source in config.sources.values()]
    jobs = [_job(file, readings[file.source].reader, config.unit_size) for file in files]
    hashes = hash_inputs(jobs, cache / HASHES, executor, rehash=rehash, remember=remember)
    hashed = tuple(replace(file, sha256=each.sha256) for file, each in zip(files, hashes, strict=True))
    return Inputs(hashed, HashedUnits(jobs, hashes), commits)


def list_files(config: MixConfig, cache: Path) -> tuple[list[InputFile], dict[str, str]]:
    """Return all input files without their hashes, and the commits of hub datasets by source name.

    Raises:
        ConfigError: as `find_inputs`.
    """
    found: list[InputFile] = []
    commits: dict[str, str] = {}
    for index, (name, source) in enumerate(config.sources.items()):
        if source.hf is not None:
            paths, commits[name] = documents.hf_files(source.hf, source.name, source.split, source.revision)
            found += [_local(index, path, f"hf://{source.hf}/{source.split}/{path.name}") for path in paths]
        else:
            found += _named_files(index, source, reading_of(config, source))
    _refuse_own_files(config, cache, found)
    return found, commits


def _named_files(index: int, source: SourceConfig, reading: Reading) -> Iterator[InputFile]:
    """Local ones, then objects, each in the order of their names."""
    urls = [path for path in source.path if is_url(path)]
    paths = [path for path in source.path if not is_url(path)]
    for path in documents.find_files(paths, reading):
        yield _local(index, path, str(path))
    for each in documents.find_objects(urls, reading):
        stat = documents.object_stat(each.path, each.stat)
        yield InputFile(stat.path, stat.bytes, stat.mtime_ns, stat.inode, index, stat.path, "")


def _job(file: InputFile, reader: str, unit_size: int) -> Job:
    stat = FileStat(file.path, file.bytes, file.mtime_ns, file.inode)
    return Job(stat, documents.reader_for(file.path, reader), unit_size)


def span_of(unit: Unit, size: int, number: int, num_units: int) -> tuple[int, int]:
    """Return the bytes of a file that its unit ``number`` reads; those of a Parquet file are shared among its units."""
    if unit.reader != "parquet":
        return unit.start, unit.stop
    return size * number // num_units, size * (number + 1) // num_units


def _refuse_own_files(config: MixConfig, cache: Path, found: list[InputFile]) -> None:
    """A source that holds the output would be another source on every run."""
    folders = (config.output, staging_of(work_of(config.output)), cache)
    own = tuple(f"{full_name(str(folder))}/" for folder in folders)
    for file in found:
        if full_name(file.path).startswith(own):
            raise ConfigError(
                f"{file.path}: would be packed, but is packing's own; keep `output` and `cache` out of sources"
            )


def _local(source: int, path: Path, name: str) -> InputFile:
    try:
        name.encode()
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            raise ConfigError(f"{path}: is a pipe or device; wanted a file, which can be read twice: write it to disk")
        with path.open("rb"):
            pass
    except UnicodeEncodeError:
        raise ConfigError(f"{name!r}: the file's name is not UTF-8; rename the file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return InputFile(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, source, name, "")
