"""Which files a mix reads, what they hold (by hash), and the units of work that they fall into."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG

from llmt_prep import documents, executor
from llmt_prep.config import MixConfig, SourceConfig
from llmt_prep.documents import Reading
from llmt_prep.progress import stage
from llmt_prep.staging import staging_of
from llmt_shared import durable
from llmt_shared.errors import ConfigError, DataError


@dataclass(frozen=True)
class InputFile:
    """One file of one source."""

    source: int
    path: str
    name: str
    """What the dataset calls it: the path, or ``hf://id/split/file``, for where a hub's cache lies says nothing."""
    bytes: int
    mtime_ns: int
    inode: int
    sha256: str


@dataclass(frozen=True)
class Inputs:
    """All files of a mix in the order of its sources, and the commits of hub datasets by source name."""

    files: tuple[InputFile, ...]
    commits: dict[str, str]


def reading_of(config: MixConfig, source: SourceConfig) -> Reading:
    """Return a source's reader settings."""
    return Reading(
        reader="arrow" if source.hf else source.reader,
        text_field=source.text_field,
        record=source.record,
        max_record_bytes=config.max_record_bytes,
    )


def find_inputs(config: MixConfig, cache: Path, workers: int, *, rehash: bool, remember: bool) -> Inputs:
    """Find and hash all input files.

    Args:
        config: the mix.
        cache: where the hashes of unchanged files are remembered.
        workers: processes.
        rehash: hash even files whose size, time and inode are as remembered.
        remember: write down what was hashed.

    Raises:
        ConfigError: a pattern matches nothing, a file cannot be read, or it is one that packing itself writes.
    """
    found: list[tuple[int, Path, str]] = []
    commits: dict[str, str] = {}
    for index, (name, source) in enumerate(config.sources.items()):
        if source.hf is not None:
            paths, commits[name] = documents.hf_files(source.hf, source.name, source.split, source.revision)
            found += [(index, path, f"hf://{source.hf}/{source.split}/{path.name}") for path in paths]
        else:
            paths = documents.find_files(source.path, reading_of(config, source))
            found += [(index, path, str(path)) for path in paths]
    _refuse_own_files(config, cache, found)
    known = read_index(cache / "files.json")
    files = _with_hashes(found, {} if rehash else known, workers)
    check_unchanged(tuple(files))  # or a wrong hash would be remembered
    if remember:
        known.update({_identity(file): file.sha256 for file in files})
        write_index(cache / "files.json", known)
    return Inputs(tuple(files), commits)


def check_unchanged(files: tuple[InputFile, ...]) -> None:
    """Raise DataError when a file is not what it was when it was hashed."""
    for file in files:
        stat = Path(file.path).stat()
        if (stat.st_size, stat.st_mtime_ns) != (file.bytes, file.mtime_ns):
            raise DataError(f"{file.path}: changed while it was read; run the same command again when it is complete")


def hash_file(path: str) -> str:
    """sha256 of a file's bytes."""
    with documents.reading_from(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(path: Path) -> dict[str, str]:
    """Return the hashes that a cache remembers; a missing or torn index costs hashing again, nothing else."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def write_index(path: Path, known: dict[str, str]) -> None:
    """Remember hashes."""
    durable.write(path, json.dumps(known, indent=0))


def _with_hashes(found: list[tuple[int, Path, str]], known: dict[str, str], workers: int) -> list[InputFile]:
    files = [_stat(*each) for each in found]
    hashes = [known.get(_identity(file), "") for file in files]
    missing = [i for i, sha256 in enumerate(hashes) if not sha256]
    with stage("hash", sum(files[i].bytes for i in missing), "bytes") as advance:
        for done, sha256 in executor.run(hash_file, [(files[i].path,) for i in missing], workers):
            hashes[missing[done]] = sha256
            advance(files[missing[done]].bytes)
    return [replace(file, sha256=sha256) for file, sha256 in zip(files, hashes, strict=True)]


def _refuse_own_files(config: MixConfig, cache: Path, found: list[tuple[int, Path, str]]) -> None:
    """A source that holds the output would be another source on every run."""
    own = [os.path.abspath(folder) + os.sep for folder in (config.output, staging_of(config.output), cache)]
    for _, path, _ in found:
        if os.path.abspath(path).startswith(tuple(own)):
            raise ConfigError(
                f"{path}: would be packed, but is packing's own; keep `output` and `cache` out of sources"
            )


def _stat(source: int, path: Path, name: str) -> InputFile:
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
    return InputFile(source, str(path), name, stat.st_size, stat.st_mtime_ns, stat.st_ino, "")


def _identity(file: InputFile) -> str:
    return f"{Path(file.path).absolute()}|{file.bytes}|{file.mtime_ns}|{file.inode}"
