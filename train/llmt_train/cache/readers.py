"""Which processes of this machine read from a cache, and where they stand: one small file each, locked while they live.

The kernel drops the lock when a process ends, however it ends, so a file that can be locked is of one that is gone.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from llmt_train.cache.distance import Following

_numbers = count()


class Seen(NamedTuple):
    """What a reader says of itself."""

    dataset: str
    """Name of its folder in the cache."""
    run: Following | None
    """Where it stands; ``None`` before it takes rows in an order."""


class Reader:
    """This process, as others see it."""

    def __init__(self, folder: Path, dataset: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._dataset = dataset
        self._path, self._descriptor = _new_file(folder)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self.tell(None)

    def tell(self, run: Following | None) -> None:
        """Say where the run stands."""
        content = json.dumps([self._dataset, run]).encode()
        os.pwrite(self._descriptor, content.ljust(_BYTES), 0)  # one write: others see the old or the new

    def close(self) -> None:
        """Leave."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


_BYTES = 512


def living(folder: Path) -> Iterator[Seen]:
    """Yield what all living readers say, this process's own among them; files of others that are gone are removed."""
    for path in sorted(folder.glob("*")):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            if _is_alive(descriptor):
                dataset, run = json.loads(os.pread(descriptor, _BYTES, 0) or b'["", null]')
                yield Seen(dataset, Following(*run) if run else None)
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _new_file(folder: Path) -> tuple[Path, int]:
    """A file and its descriptor; processes of two containers may have the same host's name and number."""
    while True:
        path = folder / f"{socket.gethostname()}-{os.getpid()}-{next(_numbers)}"
        with suppress(FileExistsError):
            return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _is_alive(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
