"""Where a dataset grows before it is finished, and who may work there.

`NAME.staging/` lies beside the output: `data/` is what will be renamed, everything else (plan, rows, journal) goes
with the directory when the dataset is done. `NAME.lock` names the one process that works on this output.
"""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmt_prep import durable
from llmt_shared.errors import ConfigError


def staging_of(output: Path) -> Path:
    """Return the directory in which the dataset grows."""
    return output.parent / f"{output.name}.staging"


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of an output; the kernel drops it when the process ends, however it ends.

    Raises:
        ConfigError: another process holds it; the message names which.
    """
    path = output.parent / f"{output.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise ConfigError(f"{path}: another run works on this output: {holder}; wait for it or stop it") from None
        if _is_same_file(path, descriptor):
            break
        os.close(descriptor)  # the holder before us removed the file between our open and our lock
    os.ftruncate(descriptor, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode())
    return descriptor


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def prepare(output: Path, recipe: str) -> tuple[Path, bool]:
    """Return the staging directory for a recipe, and whether it already holds work on the same recipe.

    Work on another recipe is removed: it is derived from the tokenized input, which the cache keeps.
    """
    staging = staging_of(output)
    note = staging / "recipe.json"
    if note.exists() and json.loads(note.read_text())["recipe"] == recipe:
        return staging, True
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    durable.write(note, json.dumps({"recipe": recipe}))
    return staging, False


def publish(output: Path) -> None:
    """Give the finished dataset its name, in one rename, and remove what only building it needed.

    An older dataset of that name is moved away first and removed last.
    """
    staging = staging_of(output)
    old = output.parent / f"{output.name}.old"
    if old.exists():
        shutil.rmtree(old)
    if output.exists():
        output.rename(old)
    (staging / "data").rename(output)
    durable.sync_directory(output.parent)
    shutil.rmtree(staging)
    if old.exists():
        shutil.rmtree(old)
