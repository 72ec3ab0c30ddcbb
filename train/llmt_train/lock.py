"""One writer to a folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmt_shared.errors import ConfigError

NAME = ".lock"


@contextmanager
def locked(folder: Path, way_out: str) -> Iterator[None]:
    """Keep a second process out of a folder; the system lets go of the lock when this one ends, however it does.

    Args:
        folder: is there.
        way_out: what to do when another process is writing to it, for the message.

    Raises:
        ConfigError: another process holds the lock.
    """
    with (folder / NAME).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another run is writing here; {way_out}") from None
        yield
