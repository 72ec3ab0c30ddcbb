"""Tasks for worker processes, which must be able to import them."""

import os
import signal
import time
from pathlib import Path

from llmt_shared import durable
from llmt_shared.errors import DataError


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def square(number: int) -> int:
    return number * number


def process(_: int) -> int:
    return os.getpid()


def do(what: str, folder: Path) -> None:
    """Write a file and never end, or wait for that file and then fail in some way."""
    if what == "write":
        with durable.writing(folder / "written") as file:
            file.write(b"half")
            file.flush()
            time.sleep(600)
    while not list(folder.glob("*.tmp")):
        time.sleep(0.01)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fail":
        raise DataError("bad record")
    if what == "fail oddly":
        raise UnpicklableError(1, 2)


def exhaust(number: int) -> None:
    raise MemoryError(number)
