"""Tasks for worker processes, which must be able to import them."""

import os
import signal
import time
from pathlib import Path

from llmt_prep.shards import SplitTask, write_shard
from llmt_prep.unit_task import TokenizeTask, UnitMeta, run_task
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
            for _ in range(60_000):  # an exception from outside waits for the end of a sleep
                time.sleep(0.01)
    while not list(folder.glob("*.tmp")):
        time.sleep(0.01)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fail":
        raise DataError("bad record")
    if what == "fail oddly":
        raise UnpicklableError(1, 2)


def run_task_slowly(task: TokenizeTask) -> UnitMeta:
    """So that tasks of other nodes run meanwhile."""
    time.sleep(0.2)
    return run_task(task)


def write_shard_slowly(task: SplitTask, shard: int) -> None:
    time.sleep(0.2)
    write_shard(task, shard)


def exhaust(number: int) -> None:
    raise MemoryError(number)


def meet(folder: Path, number: int, wanted: int) -> int:
    """Wait in a folder until so many files are there, one of each task; returns the process that has begun this one."""
    (folder / str(number)).touch()
    end = time.monotonic() + 120
    while len(list(folder.iterdir())) < wanted:
        if time.monotonic() > end:
            raise TimeoutError(f"only {sorted(path.name for path in folder.iterdir())} came")
        time.sleep(0.01)
    return os.getppid()


def slow_square(number: int, seconds: float) -> int:
    time.sleep(seconds)
    return number * number


def surroundings(_: int) -> tuple[str, int, str | None, str | None]:
    """Folder, umask and what keeps tokenizers to one thread."""
    mask = os.umask(0)
    os.umask(mask)
    return os.getcwd(), mask, os.environ.get("TOKENIZERS_PARALLELISM"), os.environ.get("FASTOKENS_BPE_THREADS")


def die_times(path: Path, times: int) -> str:
    """Kill this process until it was killed so often, as files beside ``path`` count."""
    for number in range(times):
        try:
            path.with_name(f"{path.name}-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"
