"""Files that are whole or absent, whenever the machine stops: temporary name, fsync, rename, fsync of the folder."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write; it appears under its name only when the block ends well.

    Where its temporary name is removed meanwhile, by whoever knows this writer for lost, the end is an OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def temporary_name(path: Path) -> Path:
    """Return the name under which this process writes a file; no process of another host has the same."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block its file: a read or write that fails does not know where."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write(path: Path, content: bytes | str) -> None:
    """Write a whole file."""
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def is_full_disk(error: OSError) -> bool:
    """Whether a write failed for want of room: on the disk, in a quota, or under the largest file size allowed."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync_directory(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
