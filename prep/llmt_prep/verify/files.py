"""Are the files those of the manifest: names, sizes, contents."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from llmt_prep.finish import RUN_REPORT
from llmt_prep.verify.findings import Finding, finding
from llmt_shared.errors import StoreError
from llmt_shared.manifest import NAME, FileEntry, Manifest
from llmt_shared.objects import Location, ObjectPath

_PIECE = 1 << 20


def damaged_files(dataset: Location, manifest: Manifest, advance: Callable[[int], None]) -> Iterator[Finding]:
    """Compare every listed file with the disk or store; reads all of them.

    Args:
        dataset: its folder or URL.
        manifest: its manifest.
        advance: told the bytes that each file should have.
    """
    for entry in manifest.files:
        yield from _damage(dataset / entry.path, entry)
        advance(entry.bytes)


def unlisted_files(dataset: Location, manifest: Manifest) -> Iterator[Finding]:
    """Files that the manifest does not list, in order; symbolic links are not followed."""
    listed = {entry.path for entry in manifest.files} | {NAME, RUN_REPORT}
    names = _names_on_disk(dataset) if isinstance(dataset, Path) else _names_in_store(dataset)
    for name in names:
        if name not in listed:
            yield finding("F005", name, "is not in the manifest; remove it, or keep it elsewhere")


def _names_on_disk(directory: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(directory):
        folders.sort()
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        yield from ((Path(folder) / name).relative_to(directory).as_posix() for name in sorted([*names, *links]))


def _names_in_store(dataset: ObjectPath) -> Iterator[str]:
    if dataset.can_list:
        yield from (each.path.url.removeprefix(f"{dataset.url}/") for each in dataset.files())


def _damage(path: Location, entry: FileEntry) -> Iterator[Finding]:
    try:
        size = path.stat().st_size
        if isinstance(path, Path) and not path.is_file():
            yield finding("F006", entry.path, "is no regular file")
        elif size != entry.bytes:
            kind = "truncated" if size < entry.bytes else "oversized"
            yield finding("F003", entry.path, f"{kind}: {size} bytes; the manifest says {entry.bytes}")
        elif (found := _sha256(path)) != entry.sha256:
            yield finding("F004", entry.path, f"sha256 is {found}; the manifest says {entry.sha256}")
    except (FileNotFoundError, NotADirectoryError):
        yield finding("F002", entry.path, f"missing; the manifest lists it with {entry.bytes} bytes")
    except OSError as error:
        yield finding("F006", entry.path, f"cannot be read: {error.strerror}")
    except StoreError as error:
        yield finding("F006", entry.path, str(error))


def _sha256(path: Location) -> str:
    state = hashlib.sha256()
    for piece in _pieces(path) if isinstance(path, Path) else path.pieces(path.stat().st_size):
        state.update(piece)
    return state.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece
