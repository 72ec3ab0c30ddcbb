"""Input objects as files of this machine, checked: every reader reads files, and a network may change what it brings.

An object is fetched whole once, to be hashed, and then unit by unit, to be tokenized: what a unit holds must be what
was hashed. The copies lie in the folder for temporary files (TMPDIR) and are gone when they have been read.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

from llmt_prep import documents
from llmt_prep.documents import FileStat, Unit
from llmt_prep.tokenization import hash_content
from llmt_shared import durable
from llmt_shared.errors import DataError, StoreError
from llmt_shared.objects import ObjectPath, is_encrypted, is_url

_TRIES = 8
"""At bytes that are not what they should be."""
_MAGIC_BYTES = 8
"""Of an Arrow file; a stream has none."""
_WAY_OUT = "mend the network or the store, or copy the file elsewhere"


class Fetched(NamedTuple):
    """An object that lies in a temporary file."""

    copy: str
    sha256: str


@contextmanager
def fetched(file: FileStat) -> Iterator[Fetched]:
    """Give an object whole, as long as the block lasts.

    It is believed where its MD5 is its etag, or where two readings agree: the etag of what was uploaded in parts, or is
    kept encrypted, is no MD5. One reading is enough over TLS where the etag does not look like an MD5.

    Raises:
        DataError: it comes with other bytes each time, or is not there any more.
    """
    seen: set[str] = set()
    with _temporary_file() as (copy, name):
        etag = _etag(file.path)
        for _ in range(_TRIES):
            sha256, md5 = _download(file, copy)
            if (md5 == etag if _is_md5(etag) else is_encrypted(file.path)) or sha256 in seen:
                break
            seen.add(sha256)
        else:
            raise DataError(f"{file.path}: other bytes came each of {_TRIES} times that it was read; {_WAY_OUT}")
        yield Fetched(name, sha256)


@contextmanager
def at_hand(unit: Unit, content: str, file: FileStat) -> Iterator[Unit]:
    """Give a unit whose bytes lie on this machine and are those that were hashed; a local one as it is.

    Args:
        unit: of an object, its own bytes are fetched, to their places in a file with holes.
        content: what `hash_content` said of it.
        file: the object, as it was then.

    Raises:
        DataError: it has changed, or comes with other bytes each time.
    """
    if not is_url(unit.path):
        yield unit
        return
    with _temporary_file() as (copy, name):
        ours = replace(unit, copy=name)
        for tries_left in reversed(range(_TRIES)):
            if _is_fetched(ours, content, file, copy, tries_left):
                break
        else:
            raise DataError(
                f"{unit.path}: bytes {unit.start} to {unit.stop} are not what was hashed, in each of {_TRIES} "
                f"readings, and the store calls it unchanged; {_WAY_OUT}, and run the same command with --rehash"
            )
        yield ours


def _is_fetched(unit: Unit, content: str, file: FileStat, copy: IO[bytes], tries_left: int) -> bool:
    """Write the bytes of a unit, and say whether they are those that were hashed."""
    try:
        _copy_ranges(unit, file.bytes, copy)
        if hash_content(unit) == content:
            return True
    except (DataError, StoreError):  # a bit of a footer that flipped leads anywhere
        documents.check_unchanged((file,))
        if not tries_left:
            raise
    documents.check_unchanged((file,))
    return False


def _copy_ranges(unit: Unit, size: int, copy: IO[bytes]) -> None:
    """With what tells what they are: the first bytes of the file, and before a line the line feed."""
    copy.truncate(0)
    copy.truncate(size)
    magic = [(0, _MAGIC_BYTES)] if unit.reader == "arrow" else []
    for begin, end in [*magic, *documents.unit_ranges(replace(unit, copy=""))]:
        first = min(max(begin - 1, 0), size)
        copy.seek(first)
        for piece in _pieces(unit.path, first, min(end, size)):
            _write(copy, piece)


def _download(file: FileStat, copy: IO[bytes]) -> tuple[str, str]:
    """Write an object; returns its sha256 and MD5."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    copy.seek(0)
    try:
        for piece in _pieces(file.path, 0, file.bytes):
            sha256.update(piece)
            md5.update(piece)
            _write(copy, piece)
    except StoreError:
        documents.check_unchanged((file,))  # of one that became shorter, the rest cannot be had
        raise
    return sha256.hexdigest(), md5.hexdigest()


def _pieces(path: str, begin: int, end: int) -> Iterator[bytes]:
    with documents.reading_from(path):
        yield from ObjectPath(path).pieces(end, begin)


def _etag(path: str) -> str:
    with documents.reading_from(path):
        return ObjectPath(path).stat().etag


def _is_md5(etag: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", etag) is not None


@contextmanager
def _temporary_file() -> Iterator[tuple[IO[bytes], str]]:
    """A file and how to open it; on Linux it has no name in its folder, so that not even a kill leaves it there."""
    if os.path.isdir("/proc/self/fd"):
        with tempfile.TemporaryFile(buffering=0) as file:
            yield file, f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile(prefix="llmt-input-", buffering=0) as named:
            yield named.file, named.name


def _write(file: IO[bytes], content: bytes) -> None:
    with durable.naming(Path(tempfile.gettempdir())):
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
