"""Where a dataset grows before it is finished, and who may work there.

`NAME.staging/` lies beside the output: `data/` is what will be renamed, everything else (plan, rows, journal, an older
dataset that is replaced) goes with the directory when the dataset is done. `NAME.lock` names the one process that works
on this output. Both are ours only if we made them: what a user keeps under these names is left alone.

Of an output below a URL they lie beside `work_of` it, where no dataset will ever be: `data/` then holds what is not
uploaded yet (uploading.py).
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmt_shared import durable
from llmt_shared.errors import ConfigError
from llmt_shared.objects import Location

_NOTE = "recipe.json"
_REPLACED = "replaced"
_OURS = {_NOTE, _REPLACED, "corpus", "corpus.json", "rows", "journal", "data"}
"""`corpus.json` was written by earlier versions."""
_HOLDER = "process "


def work_of(output: Location) -> Path:
    """Return the path beside which an output is worked on: its own, or, of a URL, one in the working directory."""
    if isinstance(output, Path):
        return output
    return Path(f"{output.name}-{hashlib.sha256(output.url.encode()).hexdigest()[:8]}")  # of two with one name, two


def staging_of(output: Path) -> Path:
    """Return the directory in which the dataset grows."""
    return output.parent / f"{output.name}.staging"


def lock_of(output: Path) -> Path:
    """Return the file that says who works on an output."""
    return output.parent / f"{output.name}.lock"


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of an output; the kernel drops it when the process ends, however it ends.

    What was made for it and holds nothing in the end is removed: folders above the output, a staging directory with
    nothing but its note.

    Raises:
        ConfigError: another process holds it, and the message names which; the file is not one of ours; there is no
            writing where the output is to be.
    """
    path = lock_of(output)
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        descriptor = _acquire(path)
        try:
            _sign(descriptor, path)
            yield
        finally:
            _discard_if_idle(staging_of(output))
            path.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        _remove_empty(missing)


def _acquire(path: Path) -> int:
    while True:
        descriptor = _opened(path)
        if descriptor is None:
            continue  # a run that failed removed the folder that it had made
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise ConfigError(f"{path}: another run works on this output: {holder}; wait for it or stop it") from None
        if _is_same_file(path, descriptor):
            break
        os.close(descriptor)  # the holder before us removed the file between our open and our lock
    if os.pread(descriptor, len(_HOLDER), 0) not in (b"", _HOLDER.encode()):
        os.close(descriptor)
        raise ConfigError(f"{path}: is no lock file of llmt-prep, but the lock needs this name; move it away")
    return descriptor


def _sign(descriptor: int, path: Path) -> None:
    """Write into the lock file who holds it."""
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    with durable.naming(path):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{_HOLDER}{os.getpid()} on {socket.gethostname()}, since {started}\n".encode())
        os.fsync(descriptor)  # other machines read it


def _opened(path: Path) -> int | None:
    """A descriptor of the lock file; nothing where its folder went away meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.filename == str(path) and not path.parent.exists():
            return None
        if durable.is_full_disk(error):
            raise
        raise ConfigError(
            f"{error.filename}: {error.strerror}; wanted to write there; choose another `output`"
        ) from None


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def recover(output: Path) -> None:
    """Put right what a kill left: give back an older dataset, remove what `publish` had no time to remove.

    Raises:
        ConfigError: a folder that no run made has the name of the staging directory.
    """
    staging = staging_of(output)
    if not staging.exists():
        return
    strangers = sorted(path.name for path in staging.iterdir() if path.name not in _OURS and path.suffix != ".tmp")
    if strangers:
        raise ConfigError(
            f"{staging}: holds {strangers[0]!r}, which is not of llmt-prep, but the dataset grows under this name; "
            f"move it away, or choose another `output`"
        )
    has_data = (staging / "data").exists()
    if has_data and (staging / _REPLACED).exists() and not output.exists():
        (staging / _REPLACED).rename(output)
    is_published = not has_data and (staging / "journal").exists()  # a journal without its data would be believed
    if is_published or not (staging / _NOTE).exists():
        _discard(staging)


def clear(output: Path) -> None:
    """Remove unfinished work on an output, for it is not wanted any more."""
    if staging_of(output).exists():
        _discard(staging_of(output))


def prepare(output: Path, recipe: str) -> tuple[Path, bool]:
    """Return the staging directory for a recipe, and whether it already holds work on the same recipe.

    Work on another recipe is removed: it is derived from the tokenized input, which the cache keeps.
    """
    staging = staging_of(output)
    if is_of(staging, recipe):
        for leftover in staging.rglob("*.tmp"):
            leftover.unlink()  # of killed processes, which would fill the disk in time
        return staging, True
    if staging.exists():
        _discard(staging)
    staging.mkdir(parents=True)
    name_recipe(staging, recipe)
    return staging, False


def name_recipe(staging: Path, recipe: str) -> None:
    """Say on which recipe a directory holds work."""
    durable.write(staging / _NOTE, json.dumps({"recipe": recipe}))


def is_of(staging: Path, recipe: str) -> bool:
    """Whether a staging directory is there and holds work on a recipe."""
    try:
        return bool(json.loads((staging / _NOTE).read_text())["recipe"] == recipe)
    except FileNotFoundError:
        return False


def forget_plan(staging: Path) -> None:
    """Remove what was made of another corpus: the plan, and all that was gathered by it."""
    (staging / "corpus" / "corpus.json").unlink(missing_ok=True)  # first: without it nothing is gone on with
    for folder in (staging / name for name in ("corpus", "rows", "journal", "data")):
        if folder.exists():
            shutil.rmtree(folder)


def publish(output: Path) -> None:
    """Give the finished dataset its name, in one rename, and remove what only building it needed.

    An older dataset of that name is moved into the staging directory first; `recover` gives it back where a kill comes
    before the second rename.
    """
    staging = staging_of(output)
    if output.exists():
        output.rename(staging / _REPLACED)
    (staging / "data").rename(output)
    for leftover in output.rglob("*.tmp"):
        leftover.unlink()  # of a task on another machine that was taken for lost, and done again
    durable.sync_directory(output.parent)
    _discard(staging)


def _discard(staging: Path) -> None:
    """Remove a staging directory; its note goes first, so that no half-removed one is gone on with."""
    (staging / _NOTE).unlink(missing_ok=True)
    durable.sync_directory(staging)
    shutil.rmtree(staging)


def _discard_if_idle(staging: Path) -> None:
    """Remove a staging directory without any work in it."""
    if staging.is_dir() and [path.name for path in staging.iterdir()] == [_NOTE]:
        _discard(staging)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the deepest first, as far as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
