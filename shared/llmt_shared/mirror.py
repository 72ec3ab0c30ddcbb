"""A dataset below a URL: what of it is copied when it is opened, and how the rest is read by ranges."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_shared import durable
from llmt_shared.chunks import ArrayChunks, Layout, unfollowed
from llmt_shared.errors import FormatError, ShortObjectError
from llmt_shared.manifest import FileEntry, Manifest, read_manifest, refuse_wrong_files, wrong_files
from llmt_shared.objects import Location, ObjectPath
from llmt_shared.order import RowOrder

_TRIES = 20
"""At a file whose content is another each time."""
_AT_ONCE = 8
_WAY_OUT = "Copy the dataset there again or pack it again"


class Mirror(NamedTuple):
    """A dataset and a folder with its files, but for the chunks of its arrays."""

    location: Location
    folder: Path
    manifest: Manifest
    digest: str


def mirrored(location: ObjectPath, folder: Path) -> Mirror:
    """Copy all files of a dataset but the chunks of its arrays; those that are there already stay.

    Raises:
        FormatError: no finished dataset, or one that is damaged.
        StoreError: the store gives no answer.
    """
    manifest, digest = read_manifest(location)
    refuse_wrong_files(wrong_files(location, manifest))
    copy_small_files(location, folder, manifest)
    return Mirror(location, folder, manifest, digest)


def copy_small_files(
    location: ObjectPath, folder: Path, manifest: Manifest, without: Collection[str] = frozenset()
) -> None:
    """Copy the files of a dataset that are no chunks, but for those named, where they are not there already."""
    wanted = [entry for entry in manifest.files if not is_chunk(entry) and entry.path not in without]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda entry: _copy(location, folder, entry), wanted))


def is_chunk(entry: FileEntry) -> bool:
    """Whether a file is a chunk of an array."""
    return "/c/" in entry.path


def fetch(location: ObjectPath, entry: FileEntry, file: BinaryIO) -> None:
    """Write one file of a dataset; what arrives must have the size and hash of the manifest.

    Raises:
        FormatError: it has not, however often it is read.
        StoreError: the store gives no answer.
    """
    found: set[str] = set()
    for _ in range(_TRIES):
        state = hashlib.sha256()
        file.seek(0)
        with _listed(location / entry.path):
            for piece in (location / entry.path).pieces(entry.bytes):
                state.update(piece)
                file.write(piece)
        if state.hexdigest() == entry.sha256:
            return
        if state.hexdigest() in found:
            break  # what is wrong in the same way twice is wrong where it lies
        found.add(state.hexdigest())
    raise FormatError(
        f"{location / entry.path}: sha256 is {state.hexdigest()}, also when it is read again; the manifest says "
        f"{entry.sha256}. {_WAY_OUT}"
    )


class RangedChunks:
    """Chunks of which only the bytes asked for are fetched; nothing is kept."""

    def __init__(self, location: ObjectPath, folder: Path) -> None:
        self._location, self._folder = location, folder

    def of(self, array: Path, layout: Layout, *, is_read_in_order: bool) -> ArrayChunks:
        """Ask the store each time."""
        return _Ranged(self._location / array.relative_to(self._folder).as_posix(), layout)

    def follow(self, split: Path, order: RowOrder | None) -> AbstractContextManager[Callable[[int], None]]:
        """Do nothing."""
        return unfollowed()


class _Ranged(NamedTuple):
    """Of one array."""

    location: ObjectPath
    layout: Layout

    @property
    def is_mapped(self) -> bool:
        """No: what is read is fetched."""
        return False

    def read(self, chunk: int, start: int, stop: int) -> NDArray[Any]:
        """Fetch elements; the chunk's checksum is of all of them, so it says nothing of some."""
        size, shape = self.layout.item_bytes, (stop - start, *self.layout.shape[1:])
        file = self.location / self.layout.file(Path(), chunk).as_posix()
        with _listed(file):
            content = file.read_range(start * size, stop * size)
        return np.frombuffer(content, self.layout.dtype, math.prod(shape)).reshape(shape)

    def will_need(self, chunk: int, places: Sequence[int]) -> None:
        """Do nothing."""


@contextmanager
def _listed(path: ObjectPath) -> Iterator[None]:
    """Tell of a file of the manifest that is gone or cut short."""
    try:
        yield
    except FileNotFoundError:
        raise FormatError(f"{path}: is not there any more; the manifest lists it. {_WAY_OUT}") from None
    except ShortObjectError as error:
        raise FormatError(f"{error}. {_WAY_OUT}") from None


def _copy(location: ObjectPath, folder: Path, entry: FileEntry) -> None:
    path = folder / entry.path
    if path.exists() and path.stat().st_size == entry.bytes:
        return
    with durable.writing(path) as file:
        fetch(location, entry, file)
