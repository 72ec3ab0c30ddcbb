"""Hashes of input files and of their units: made in one read where a file allows it, and remembered.

What is remembered of a file counts while its size, time and inode stay. The index is one file that is replaced whole:
of two runs that write it at once the later wins, and what it lacks, like an index that is torn or damaged, costs
hashing again and nothing else.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import xxhash

from llmt_prep import documents
from llmt_prep.documents import FileStat, Unit, check_unchanged
from llmt_prep.executor import HERE, Executor
from llmt_prep.fetching import fetched
from llmt_prep.tokenization import hash_content
from llmt_shared import durable
from llmt_shared.objects import is_url
from llmt_shared.progress import stage

IN_PROCESS_BYTES = 1 << 30
"""Less than this is read in this process: starting others takes as long."""
_REQUEST_BYTES = 16 << 20
"""Bytes that are read while a store is asked for one object."""
_VERSION = 1
"""Of the index; raised when it says other things, or files are cut into units in another way."""
_CUTS_OF_A_FILE = 4
_OTHER_FILES = 20_000
"""Files of other mixes that the index keeps."""
_UNSETTLED_NS = 2_000_000_000
"""A file changed again this soon may keep its time, so coarse are those of some file systems."""


class UnitHash(NamedTuple):
    """A unit of a file: its range as in `documents.Unit`, and its `hash_content`."""

    start: int
    stop: int
    content: str


class FileHashes(NamedTuple):
    """What hashing a file gives."""

    sha256: str
    units: tuple[UnitHash, ...]


class Entry(TypedDict):
    """What the index says of one file, under its absolute path or URL."""

    bytes: int
    mtime_ns: int
    inode: int
    sha256: str
    units: dict[str, list[UnitHash]]
    """By reader and unit size; the newest last."""


class Job(NamedTuple):
    """A file to hash, and how it is cut."""

    file: FileStat
    reader: str
    unit_size: int

    @property
    def cut(self) -> str:
        """Name of the cut in the index."""
        return f"{self.reader} {self.unit_size}"


def hash_inputs(
    jobs: Sequence[Job], index: Path, executor: Executor, *, rehash: bool, remember: bool
) -> list[FileHashes]:
    """Return the hashes of each file and of its units.

    Args:
        jobs: files; one that comes twice is hashed once.
        index: where hashes of unchanged files are remembered.
        executor: runs the jobs, where they are many bytes.
        rehash: do not believe the index.
        remember: write down what was hashed, also when the run is stopped in the middle.

    Raises:
        DataError: a file is broken, or changes while it is read.
    """
    entries = {} if rehash else read_index(index)
    known = {job: found for job in jobs if (found := _known(job, entries)) is not None}
    missing = [job for job in dict.fromkeys(jobs) if job not in known]
    total, now = sum(job.file.bytes for job in missing), time.time_ns()
    new: dict[Job, FileHashes] = {}
    try:
        with stage("hash", total, "bytes") as advance:
            tasks = ((job,) for job in missing)
            requests = _REQUEST_BYTES * sum(is_url(job.file.path) for job in missing)
            for done, hashes in (executor if total + requests > IN_PROCESS_BYTES else HERE).run(hash_input, tasks):
                new[missing[done]] = hashes
                advance(missing[done].file.bytes)
    finally:
        settled = {job: hashes for job, hashes in new.items() if abs(now - job.file.mtime_ns) > _UNSETTLED_NS}
        if remember and settled:
            write_index(index, settled, used=[job.file for job in jobs])
    known |= new
    return [known[job] for job in jobs]


def hash_input(job: Job) -> FileHashes:
    """Hash one file and its units; in any process.

    Units of lines tile their file, so one read serves both; those of Parquet and Arrow leave gaps and share a footer.
    """
    if is_url(job.file.path):
        return _hash_object(job)
    units = documents.split_into_units(job.file.path, job.reader, job.unit_size)
    if units[0].reader in ("jsonl", "text"):
        sha256, contents = _hash_tiles(units)
    else:
        sha256, contents = hash_file(job.file.path), [hash_content(unit) for unit in units]
    check_unchanged([job.file])
    return _file_hashes(sha256, units, contents)


def hash_file(path: str) -> str:
    """sha256 of a file's bytes."""
    with documents.reading_from(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(path: Path) -> dict[str, Entry]:
    """Return what the index says, by absolute path or URL; nothing where it is not whole or of another version."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        entries: dict[str, Entry] = json.loads(body) if head == _head(body) else {}
    except OSError:
        return {}
    return entries


def write_index(path: Path, new: Mapping[Job, FileHashes], used: Sequence[FileStat]) -> None:
    """Add hashes to the index, as it is now; files not in ``used`` go, the oldest first, where there are too many."""
    entries = read_index(path)
    for job, hashes in new.items():
        name, stat = _name(job.file), job.file
        old = entries.pop(name, None)
        cuts = old["units"] if old and _is_of(old, stat) and old["sha256"] == hashes.sha256 else {}
        cuts = {cut: units for cut, units in cuts.items() if cut != job.cut} | {job.cut: list(hashes.units)}
        entries[name] = Entry(
            bytes=stat.bytes,
            mtime_ns=stat.mtime_ns,
            inode=stat.inode,
            sha256=hashes.sha256,
            units=dict(list(cuts.items())[-_CUTS_OF_A_FILE:]),
        )
    names = {_name(stat) for stat in used}
    others = [name for name in entries if name not in names]
    for name in others[: max(len(others) - _OTHER_FILES, 0)]:
        del entries[name]
    body = json.dumps(entries).encode()  # json, not orjson: a path may hold what is no UTF-8
    durable.write(path, _head(body) + b"\n" + body)


def _hash_object(job: Job) -> FileHashes:
    with fetched(job.file) as (copy, sha256):
        check_unchanged([job.file])
        units = documents.split_into_units(job.file.path, job.reader, job.unit_size, copy)
        return _file_hashes(sha256, units, [hash_content(unit) for unit in units])


def _file_hashes(sha256: str, units: Sequence[Unit], contents: Sequence[str]) -> FileHashes:
    found = zip(units, contents, strict=True)
    return FileHashes(sha256, tuple(UnitHash(unit.start, unit.stop, content) for unit, content in found))


def _known(job: Job, entries: Mapping[str, Entry]) -> FileHashes | None:
    entry = entries.get(_name(job.file))
    if entry is None or not _is_of(entry, job.file) or job.cut not in entry["units"]:
        return None
    return FileHashes(entry["sha256"], tuple(UnitHash(*unit) for unit in entry["units"][job.cut]))


def _is_of(entry: Entry, file: FileStat) -> bool:
    return (entry["bytes"], entry["mtime_ns"], entry["inode"]) == (file.bytes, file.mtime_ns, file.inode)


def _name(file: FileStat) -> str:
    return documents.full_name(file.path)


def _head(body: bytes) -> bytes:
    return f"llmt hashes {_VERSION} {xxhash.xxh3_128_hexdigest(body)}".encode()


def _hash_tiles(units: Sequence[Unit]) -> tuple[str, list[str]]:
    whole = hashlib.sha256()
    contents = [hash_content(unit, whole.update) for unit in units]
    return whole.hexdigest(), contents
