"""Are the files those of the manifest: names, sizes, contents."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from llmt_prep.finish import RUN_REPORT
from llmt_prep.verify.findings import Finding, finding
from llmt_shared.manifest import NAME, FileEntry, Manifest

_PIECE = 1 << 20


def damaged_files(directory: Path, manifest: Manifest, advance: Callable[[int], None]) -> Iterator[Finding]:
    """Compare every listed file with the disk; reads all of them.

    Args:
        directory: of the dataset.
        manifest: its manifest.
        advance: told the bytes that each file should have.
    """
    for entry in manifest.files:
        yield from _damage(directory / entry.path, entry)
        advance(entry.bytes)


def unlisted_files(directory: Path, manifest: Manifest) -> Iterator[Finding]:
    """Files that the manifest does not list, in order; symbolic links are not followed."""
    listed = {entry.path for entry in manifest.files} | {NAME, RUN_REPORT}
    for folder, folders, names in os.walk(directory):
        folders.sort()
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted([*names, *links]):
            path = (Path(folder) / name).relative_to(directory).as_posix()
            if path not in listed:
                yield finding("F005", path, "is not in the manifest; remove it, or keep it elsewhere")


def _damage(path: Path, entry: FileEntry) -> Iterator[Finding]:
    try:
        size = path.stat().st_size
        if not path.is_file():
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


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            state.update(piece)
    return state.hexdigest()
