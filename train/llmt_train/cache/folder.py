"""A folder of fetched files with a limit that is never exceeded, shared by the processes of a machine.

It lies in the folder that the user names, which may hold other files: those are neither counted nor removed.

    lock                  held while it is decided what comes in and what goes
    readers/              who reads, and where they stand (readers.py)
    DATASET/NAME          a file of a dataset, whole and checked
    DATASET/NAME.part     the room of one that is being fetched; who fetches it holds its lock
    DATASET.reference/    what `llmt-train ref` computed: no copy of anything, so it stays, and is not counted

A file that is read is locked by its readers, so it cannot go; the kernel drops the locks of a process that ends. What a
killed process was fetching is fetched by the next that wants it, or removed when room is needed.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llmt_shared import durable
from llmt_shared.errors import ConfigError
from llmt_train.cache.distance import NEVER, distances
from llmt_train.cache.readers import Reader, living

NAME = "llmt-chunks"
"""Of the folder in the user's."""
PART = ".part"
_READERS = "readers"


class Outcome(Enum):
    """What became of a wish to have a file."""

    THERE = "there"
    BUSY = "another process or thread fetches it"
    FULL = "no room, for all that is there is needed sooner or being read"
    UNWANTED = "not wanted any more"


class _Resident(NamedTuple):
    path: Path
    bytes: int
    distance: float
    """In rows, to its next use by any reader."""


class CacheFolder:
    """One cache; any number of processes and threads may open it."""

    def __init__(self, path: Path, limit: int) -> None:
        """Make the folder where there is none.

        Args:
            path: of the user's folder.
            limit: bytes of all files in it.

        Raises:
            ConfigError: it cannot be made or written.
        """
        self.path, self.limit = path / NAME, limit
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            os.close(self._open_lock())
        except OSError as error:
            raise ConfigError(f"cache.path: {path}: {error.strerror}; wanted a folder to write to") from None

    def join(self, dataset: str) -> Reader:
        """Be seen as a reader of a dataset, the name of whose folder this is."""
        with self.deciding():  # one that has no lock yet looks like one that is gone
            return Reader(self.path / _READERS, dataset)

    def hold(self, path: Path) -> int | None:
        """Return a descriptor of a file that is there, which stays there until it is closed; ``None``: it is not."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # it was removed between the two
        return None

    def fetch(
        self,
        path: Path,
        size: int,
        write: Callable[[BinaryIO], None],
        distance: float,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Outcome:
        """Have a file written, if it is not there and there is room.

        Args:
            path: of the file.
            size: its bytes.
            write: writes it, whole and checked, into a file that has its size already.
            distance: rows until it is used; only what is used later is removed for it. Below 0: it is waited for.
            is_wanted: asked while nobody else lets files in or out, before any is removed for this one.

        Raises:
            Exception: what ``write`` raises; then the file is not there.
            ConfigError: the disk is full.
        """
        part = path.with_name(path.name + PART)
        with self.deciding():
            if path.exists():
                return Outcome.THERE
            if not is_wanted():
                return Outcome.UNWANTED
            self._make_folder(part.parent)
            descriptor = _own(part)
            if descriptor is None:
                return Outcome.BUSY
            try:
                if path.exists():  # who had it before us has just finished
                    part.unlink(missing_ok=True)
                    return _left(descriptor, Outcome.THERE)
                if not self.make_room(size - os.fstat(descriptor).st_size, distance, sparing=part):
                    part.unlink()
                    return _left(descriptor, Outcome.FULL)
                self._reserve(descriptor, size)
            except BaseException:
                part.unlink(missing_ok=True)
                os.close(descriptor)
                raise
        try:
            with open(descriptor, "r+b", closefd=False) as file:
                write(file)
            os.fsync(descriptor)
            with self.deciding():  # a name that changes while others count would be counted twice, or not at all
                part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return Outcome.THERE

    def wait_for(self, path: Path) -> None:
        """Wait until nobody fetches a file any more; it may be there then."""
        try:
            descriptor = os.open(path.with_name(path.name + PART), os.O_RDONLY)
        except FileNotFoundError:
            return
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.close(descriptor)

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Keep all others from letting files in or out."""
        descriptor = self._open_lock()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def make_room(self, size: int, distance: float, sparing: Path | None = None) -> bool:
        """Remove files until ``size`` more bytes fit, those first that are used last; nothing where that is not enough.

        The caller is `deciding`.
        """
        sizes = {path: _size(path) for path in self._files()}
        missing = sum(sizes.values()) + size - self.limit
        if missing <= 0:
            return True
        going: list[tuple[_Resident, int]] = []
        for each in sorted(self._residents(sizes), key=lambda each: (-each.distance, each.path)):
            if missing <= 0 or (distance >= 0 and each.distance <= distance):
                break
            if each.path != sparing and (descriptor := _lock_unused(each.path)) is not None:
                going.append((each, descriptor))
                missing -= each.bytes
        for each, descriptor in going:
            if missing <= 0:
                each.path.unlink()
            os.close(descriptor)
        return missing <= 0

    def _make_folder(self, folder: Path) -> None:
        """Make one of a dataset's folders, but never the cache anew where somebody has removed it."""
        inside = folder.relative_to(self.path)
        for parent in [*[*inside.parents][-2::-1], inside]:
            (self.path / parent).mkdir(exist_ok=True)

    def _reserve(self, descriptor: int, size: int) -> None:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            else:  # macOS: the size counts, though the disk may be full before it is written
                os.truncate(descriptor, size)
        except OSError as error:
            if not durable.is_full_disk(error):
                raise
            raise ConfigError(
                f"cache.size: {self.limit} bytes, but the disk is full: {self.path}: {error.strerror}; make room on "
                f"it, set a smaller cache.size, or another cache.path"
            ) from None

    def _residents(self, sizes: Mapping[Path, int]) -> Iterator[_Resident]:
        """Those of all files that may go."""
        readers = list(living(self.path / _READERS))
        by_dataset: dict[str, list[Path]] = {}
        for path in sizes:
            by_dataset.setdefault(path.relative_to(self.path).parts[0], []).append(path)
        for dataset, paths in by_dataset.items():
            folder = self.path / dataset
            runs = [reader.run for reader in readers if reader.dataset == dataset]
            names = [path.relative_to(folder).as_posix() for path in paths]
            seen = [distances(names, folder, run) for run in runs if run is not None]
            for name, path in zip(names, paths, strict=True):
                if runs and "/c/" not in name:
                    continue  # small, and whoever has the dataset open counts on them
                distance = min((each[name] for each in seen), default=NEVER) if path.suffix != PART else NEVER
                yield _Resident(path, sizes[path], distance)

    def _files(self) -> Iterator[Path]:
        """All files of datasets, and parts of them."""
        for folder in self.path.iterdir():
            if folder.is_dir() and folder.name != _READERS and not folder.suffix:
                for parent, _, names in os.walk(folder):
                    yield from (Path(parent) / name for name in names)

    def _open_lock(self) -> int:
        return os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)


def _own(part: Path) -> int | None:
    """A locked descriptor of a part, made where there is none; ``None`` where another has it."""
    descriptor = _lock_unused(part, os.O_CREAT)
    if descriptor is not None and not os.fstat(descriptor).st_nlink:
        os.close(descriptor)  # whoever had it has failed, and removed it between the two
        return None
    return descriptor


def _lock_unused(path: Path, more_flags: int = 0) -> int | None:
    """A locked descriptor of a file that is there and that nobody reads or writes."""
    try:
        descriptor = os.open(path, os.O_RDWR | more_flags, 0o666)  # what is read alone cannot be locked so on NFS
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _left(descriptor: int, outcome: Outcome) -> Outcome:
    os.close(descriptor)
    return outcome


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # its fetching failed just now
        return 0
