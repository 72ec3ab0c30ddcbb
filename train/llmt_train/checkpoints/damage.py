"""Checksums of a checkpoint's files: who finds one wrong sets the checkpoint aside. Torch never looks at its own."""

import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

from llmt_shared.errors import FormatError
from llmt_train.checkpoints.folders import clear, complete_checkpoints, read_state
from llmt_train.parallel.together import by_first, num_ranks, own_rank, together

_BLOCK = 1 << 24
"""Bytes."""


class Print(NamedTuple):
    """What is remembered of a file's content."""

    size: int
    checksum: int
    """CRC-32."""


def print_of(path: Path) -> Print:
    """Return a file's size in bytes and its checksum."""
    size, checksum = 0, 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return Print(size, checksum)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a complete checkpoint's files; the ranks share the work, and all get the answer.

    A file that may not be read is not damaged: that is an OSError, and nothing is set aside for it.
    """
    checksums = by_first(lambda: read_state(folder).checksums)
    own = sorted(checksums)[own_rank() :: num_ranks()]
    found = together(partial(_first_damage, folder, {name: checksums[name] for name in own}))
    return next((reason for reason in found if reason is not None), None)


def _first_damage(folder: Path, checksums: dict[str, int]) -> str | None:
    for name, checksum in checksums.items():
        try:
            found = print_of(folder / name).checksum
        except (PermissionError, BlockingIOError):
            raise
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != checksum:
            return f"the checksum of {name} is wrong"
    return None


def check_undamaged(folder: Path) -> None:
    """Raise FormatError where a complete checkpoint's files are not what was written."""
    reason = find_damage(folder)
    if reason is not None:
        raise FormatError(f"{folder}: {reason}; remove this step's folder, and the one before it serves")


def set_damaged_aside(run_dir: Path) -> list[str]:
    """Rename the newest checkpoints that are damaged, up to the first sound one, so that nothing uses them.

    All ranks call it; the first one renames.

    Returns:
        What was found and where it lies now, a line for each.
    """
    found = []
    for folder in by_first(lambda: list(complete_checkpoints(run_dir))):
        reason = find_damage(folder)
        if reason is None:
            break
        aside = by_first(partial(_set_aside, folder))
        found.append(f"{folder}: {reason}; set aside as {aside}, the checkpoint before it is used")
    return found


def _set_aside(folder: Path) -> str:
    aside = folder.with_name(f"damaged-{folder.name}")
    clear(aside)
    folder.rename(aside)
    return aside.name
