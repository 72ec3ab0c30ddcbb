"""The cache of tokenized input: where things lie in it, whose it is, and who uses it.

    CACHEDIR.TAG            marks the folder as ours, and for backup tools as one that can be made again
    lock                    shared by the runs that use the cache, exclusive while it is pruned
    hashes                  of input files (hashes.py)
    tokenizers/DIGEST/      files of a tokenizer, for workers to load
    units/KE/KEY/           a unit of the token store (store.py)

Source of CACHEDIR.TAG: Cache Directory Tagging Specification, bford.info/cachedir.
"""

import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmt_prep.config import MixConfig
from llmt_prep.staging import work_of
from llmt_prep.store import is_running, read_origin
from llmt_shared import durable
from llmt_shared.errors import ConfigError
from llmt_shared.progress import say

_TAG = "CACHEDIR.TAG"
_TAG_START = "Signature: 8a477f597d28d172789f06886806bc55\n# Tokenized input of llmt-prep"
_TAG_CONTENT = f"{_TAG_START}; it can be made again from the input. `llmt-prep cache prune` makes it smaller.\n"
_LOCK = "lock"
_OURS = {_TAG, _LOCK, "hashes", "tokenizers", "units", "files.json", "units.json"}
"""The last two are of caches that had no tag yet."""
_FACTS = {"version", "content", "range", "reading", "tokenizer", "settings"}
"""What `tokenization.unit_facts` says at least."""
_LOCK_BYTES = 1 << 16
"""Names of holders beyond this are forgotten: those of killed runs stay until the cache is pruned."""


@dataclass(frozen=True)
class Origin:
    """What a unit was made of, kept with it to tell why another is not the same."""

    facts: dict[str, Any]
    """`tokenization.unit_facts`: the unit's key is their hash."""
    file: str
    """Absolute path, or ``hf://id/split/file``; other files with the same content share the unit."""
    file_sha256: str
    unit_size: int
    tokenizer: str
    """Path or hub id."""


def cache_of(config: MixConfig) -> Path:
    """Return the folder of a mix's cache."""
    output = work_of(config.output)
    return config.cache or (output.resolve() if output.is_symlink() else output).parent / ".llmt-cache"


def lock_of(cache: Path) -> Path:
    """Return the file that says who uses a cache."""
    return cache / _LOCK


def units_of(cache: Path) -> Path:
    """Return the folder below which all units lie (see `store.unit_folder`)."""
    return cache / "units"


def tokenizer_directory(cache: Path, digest: str) -> Path:
    """Return the folder of a tokenizer's files."""
    return cache / "tokenizers" / digest[:32]


def unit_folders(cache: Path) -> Iterator[Path]:
    """Yield the folders of all units, in the order of keys."""
    for group in sorted(units_of(cache).glob("[0-9a-f][0-9a-f]")):
        yield from (folder for folder in sorted(group.iterdir()) if re.fullmatch(r"[0-9a-f]{64}", folder.name))


def origin_of(folder: Path) -> Origin | None:
    """Return what a unit was made of; ``None`` where an older version wrote it, or it is gone or damaged."""
    try:
        origin = Origin(**read_origin(folder))
        return origin if set(origin.facts) >= _FACTS else None
    except TypeError:
        return None


def is_cache(cache: Path) -> bool:
    """Whether a folder has our tag."""
    try:
        return (cache / _TAG).read_text("utf-8").startswith(_TAG_START)
    except (OSError, ValueError):
        return False


def check_is_cache(cache: Path) -> None:
    """Raise ConfigError where a folder is no cache of ours."""
    if not is_cache(cache):
        raise ConfigError(
            f"{cache}: no cache of llmt-prep, which would hold a {_TAG} of its own; "
            f"wanted the `cache` of a mix, by default .llmt-cache beside its output"
        )


@contextmanager
def in_use(cache: Path) -> Iterator[None]:
    """Make the cache where there is none, and keep its units from being pruned.

    It waits where the cache is being pruned. A cache that was made for a run that fails at once is removed.

    Raises:
        ConfigError: the folder holds what is not ours: it must not be marked as one that can be made again.
    """
    is_new = not cache.exists()
    _make(cache)
    with _sharing(os.open(lock_of(cache), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666), cache) as descriptor:
        _sign(descriptor)
        try:
            yield
        except BaseException:
            if is_new and set(os.listdir(cache)) == {_TAG, _LOCK} and _locks(descriptor, fcntl.LOCK_EX):
                shutil.rmtree(cache, ignore_errors=True)
            raise


@contextmanager
def being_read(cache: Path) -> Iterator[None]:
    """Keep the units of a cache, if there is one, from being pruned, and change nothing in it."""
    try:
        descriptor = os.open(lock_of(cache), os.O_RDONLY)
    except OSError:  # no cache, or not ours to read
        yield
        return
    with _sharing(descriptor, cache):
        yield


@contextmanager
def being_pruned(cache: Path) -> Iterator[None]:
    """Keep all others out of the cache.

    Raises:
        ConfigError: a run uses it, and the message names which.
    """
    descriptor = os.open(lock_of(cache), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        if not _locks(descriptor, fcntl.LOCK_EX):
            raise ConfigError(f"{cache}: in use by {_holders(cache)}; wait for it or stop it")
        os.ftruncate(descriptor, 0)
        _sign(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _sharing(descriptor: int, cache: Path) -> Iterator[int]:
    try:
        if not _locks(descriptor, fcntl.LOCK_SH):
            say(f"{cache}: waiting for {_holders(cache)}, which prunes it")
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield descriptor
    finally:
        os.close(descriptor)


def _locks(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(descriptor: int) -> None:
    """Leave a line that names this process."""
    if os.fstat(descriptor).st_size > _LOCK_BYTES:
        os.ftruncate(descriptor, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode())
    os.fsync(descriptor)  # other machines read it


def _holders(cache: Path) -> str:
    """Who may hold the lock: all that signed it, but for processes of this machine that have ended."""
    lines = lock_of(cache).read_text(errors="replace").splitlines()
    running = [line for line in lines if not _has_ended(line)]
    return "; ".join(running) or "a run that only reads it"


def _has_ended(line: str) -> bool:
    match = re.match(r"process (\d+) on (.+), since ", line)
    return match is None or (match[2] == socket.gethostname() and not is_running(int(match[1])))


def _make(cache: Path) -> None:
    if is_cache(cache):
        return
    names = sorted(path.name for path in cache.iterdir()) if cache.exists() else []
    strangers = [name for name in names if name not in _OURS and not name.endswith(".tmp")]
    if strangers:
        raise ConfigError(
            f"{cache}: holds {strangers[0]!r}, which is not of llmt-prep; wanted a folder of its own as `cache`"
        )
    durable.write(cache / _TAG, _TAG_CONTENT)
