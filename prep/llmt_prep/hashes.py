"""Hashes of input files and of their units: made in one read where a file allows it, and remembered.

What is remembered of a file counts while its size, time and inode stay. The index is one file that is replaced whole:
of two runs that write it at once the later wins, and what it lacks, like a line that is damaged, costs hashing again
and nothing else. After its head it has one line for each file, so that no more than one is ever in memory.
"""

import hashlib
import json
import time
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from struct import Struct
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
_HEAD = b"llmt hashes 2\n"
"""Of the index; its number is raised when it says other things, or files are cut into units in another way."""
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


_PACKED = Struct("<qq16s")
"""A `UnitHash`."""


class FileHashes(NamedTuple):
    """What hashing a file gives."""

    sha256: str
    packed: bytes
    """Its units, of which there may be very many; 32 bytes each."""

    @property
    def num_units(self) -> int:
        """Units of the file."""
        return len(self.packed) // _PACKED.size

    def unit(self, number: int) -> UnitHash:
        """Return one of the units."""
        start, stop, content = _PACKED.unpack_from(self.packed, number * _PACKED.size)
        return UnitHash(start, stop, content.hex())

    @property
    def units(self) -> list[UnitHash]:
        """All of them, in the order of the file."""
        return [self.unit(number) for number in range(self.num_units)]


class Entry(TypedDict):
    """What the index says of one file."""

    name: str
    """Absolute path or URL."""
    bytes: int
    mtime_ns: int
    inode: int
    sha256: str
    units: dict[str, str]
    """`FileHashes.packed` in base64, by reader and unit size; the newest last."""


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
    known = {} if rehash else _known(jobs, read_index(index))
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
    return file_hashes(sha256, units, contents)


def file_hashes(sha256: str, units: Iterable[Unit], contents: Iterable[str]) -> FileHashes:
    """Put together the hashes of a file, of its units and of their contents."""
    packed = bytearray()
    for unit, content in zip(units, contents, strict=True):
        packed += _PACKED.pack(unit.start, unit.stop, bytes.fromhex(content))
    return FileHashes(sha256, bytes(packed))


def hash_file(path: str) -> str:
    """sha256 of a file's bytes."""
    with documents.reading_from(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(path: Path) -> Iterator[Entry]:
    """Yield what the index says, file by file, but for damaged lines; nothing where it is of another version."""
    try:
        with path.open("rb") as lines:
            for line in lines if lines.read(len(_HEAD)) == _HEAD else ():
                checksum, _, body = line.partition(b" ")
                if checksum == xxhash.xxh3_128_hexdigest(body).encode():
                    yield json.loads(body)
    except OSError:
        return


def write_index(path: Path, new: Mapping[Job, FileHashes], used: Sequence[FileStat]) -> None:
    """Add hashes to the index, as it is now; files not in ``used`` go, the oldest first, where there are too many."""
    jobs: dict[str, list[Job]] = {}
    for job in new:
        jobs.setdefault(_name(job.file), []).append(job)
    names, old, num_others = {_name(stat) for stat in used}, dict[str, Entry](), 0
    for entry in read_index(path):
        num_others += entry["name"] not in names
        if entry["name"] in jobs:
            old[entry["name"]] = entry
    spare = max(num_others - _OTHER_FILES, 0)
    with durable.writing(path) as file:
        file.write(_HEAD)
        for entry in read_index(path):
            is_spare = spare > 0 and entry["name"] not in names
            spare -= is_spare
            if not is_spare and entry["name"] not in jobs:
                file.write(_line(entry))
        for name, of_file in jobs.items():
            file.write(_line(_entry(name, old.get(name), {job: new[job] for job in of_file})))


def _entry(name: str, old: Entry | None, new: Mapping[Job, FileHashes]) -> Entry:
    """A file's new line, from what the index said of it and some cuts of it."""
    (stat, *_), (sha256, *_) = [job.file for job in new], [hashes.sha256 for hashes in new.values()]
    cuts = dict(old["units"]) if old and _is_of(old, stat) and old["sha256"] == sha256 else {}
    for job, hashes in new.items():
        cuts.pop(job.cut, None)  # the newest last
        cuts[job.cut] = b64encode(hashes.packed).decode()
    return Entry(
        name=name,
        bytes=stat.bytes,
        mtime_ns=stat.mtime_ns,
        inode=stat.inode,
        sha256=sha256,
        units=dict(list(cuts.items())[-_CUTS_OF_A_FILE:]),
    )


def _line(entry: Entry) -> bytes:
    body = json.dumps(entry).encode() + b"\n"  # json, not orjson: a path may hold what is no UTF-8
    return xxhash.xxh3_128_hexdigest(body).encode() + b" " + body


def _hash_object(job: Job) -> FileHashes:
    with fetched(job.file) as (copy, sha256):
        check_unchanged([job.file])
        units = documents.split_into_units(job.file.path, job.reader, job.unit_size, copy)
        return file_hashes(sha256, units, [hash_content(unit) for unit in units])


def _known(jobs: Iterable[Job], index: Iterable[Entry]) -> dict[Job, FileHashes]:
    by_name: dict[str, list[Job]] = {}
    for job in dict.fromkeys(jobs):
        by_name.setdefault(_name(job.file), []).append(job)
    return {
        job: FileHashes(entry["sha256"], b64decode(entry["units"][job.cut]))
        for entry in index
        for job in by_name.get(entry["name"], ())
        if _is_of(entry, job.file) and job.cut in entry["units"]
    }


def _is_of(entry: Entry, file: FileStat) -> bool:
    return (entry["bytes"], entry["mtime_ns"], entry["inode"]) == (file.bytes, file.mtime_ns, file.inode)


def _name(file: FileStat) -> str:
    return documents.full_name(file.path)


def _hash_tiles(units: Sequence[Unit]) -> tuple[str, list[str]]:
    whole = hashlib.sha256()
    contents = [hash_content(unit, whole.update) for unit in units]
    return whole.hexdigest(), contents
