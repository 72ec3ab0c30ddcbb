"""An input file wherever it lies, on a disk or below a URL: its bytes, and what tells it from what it was."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from llmt_prep.documents.faults import reading_from
from llmt_shared.errors import DataError
from llmt_shared.objects import ObjectPath, ObjectStat, is_url

_PIECE = 1 << 20
_AT_ONCE = 16
"""Questions to a store on their way."""
_SECOND = 1_000_000_000

ByteRange = tuple[int, int]
"""First byte, and the one after the last."""


@dataclass(frozen=True, slots=True)
class FileStat:
    """A file as it was before it was read."""

    path: str
    """As it was named, or its URL."""
    bytes: int
    mtime_ns: int
    """Of an object in whole seconds, for its listing may know more than the object itself."""
    inode: int
    """Of an object a hash of its etag."""


def opened(path: str) -> BinaryIO:
    """Open to read; of an object, what is read is fetched, and not checked as `fetching` does."""
    return ObjectPath(path).open() if is_url(path) else open(path, "rb")


def size_of(path: str) -> int:
    """Bytes of a file or object."""
    return (ObjectPath(path) if is_url(path) else Path(path)).stat().st_size


def bytes_between(path: str, begin: int, end: int) -> Iterator[bytes]:
    """Yield a range of a file in pieces; a local one may end before."""
    if is_url(path):
        yield from ObjectPath(path).pieces(end, begin)
        return
    with open(path, "rb") as file:
        file.seek(begin)
        while begin < end and (piece := file.read(min(_PIECE, end - begin))):
            begin += len(piece)
            yield piece


def full_name(path: str) -> str:
    """What names the same file in every working directory: an absolute path, or a URL."""
    return path if is_url(path) else os.path.abspath(path)


def object_stat(path: ObjectPath, stat: ObjectStat) -> FileStat:
    """Return what a store says of an object, in the form of a file's."""
    inode = xxhash.xxh3_64_intdigest(stat.etag.encode()) >> 1  # as JSON and files.parquet hold it
    return FileStat(str(path), stat.st_size, stat.st_mtime_ns // _SECOND * _SECOND, inode)


def check_unchanged(files: Iterable[FileStat]) -> None:
    """Raise DataError when a file is not what it was when it was hashed."""
    remote: list[FileStat] = []
    for file in files:
        if is_url(file.path):
            remote.append(file)
            continue
        stat = Path(file.path).stat()
        if (stat.st_size, stat.st_mtime_ns) != (file.bytes, file.mtime_ns):
            raise _changed(file)
    if remote:
        with ThreadPoolExecutor(min(_AT_ONCE, len(remote))) as pool:
            list(pool.map(_check_object, remote))


def _check_object(file: FileStat) -> None:
    path = ObjectPath(file.path)
    with reading_from(file.path):
        now = object_stat(path, path.stat())
    if (now.bytes, now.mtime_ns, now.inode) != (file.bytes, file.mtime_ns, file.inode):
        raise _changed(file)


def _changed(file: FileStat) -> DataError:
    return DataError(f"{file.path}: changed while it was read; run the same command again when it is complete")
