"""What a cache holds, counted without its own code."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llmt_train.cache.folder import CacheFolder

SIZE = 1000
"""Bytes of a file that `fill` writes."""


def fill(file: BinaryIO) -> None:
    """Write a file of a cache."""
    file.write(b"x" * SIZE)


def in_all(folder: CacheFolder) -> int:
    """Bytes of all files but the lock and the readers'."""
    return sum(
        os.path.getsize(os.path.join(parent, name))
        for parent, _, names in os.walk(folder.path)
        if Path(parent) != folder.path and Path(parent).name != "readers"
        for name in names
    )


@contextmanager
def watched(path: Path, limit: int, pause: float = 0.001) -> Iterator[list[int]]:
    """Add up all files of a cache again and again; the list holds the most that was there at once."""
    folder, most, stop = CacheFolder(path, limit), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(pause):
            with folder.deciding():
                most[0] = max(most[0], in_all(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()
