"""A dataset that grows below a URL: nothing there can be renamed, so a note says whose it is until it is finished.

`PACKING.json` is written first and removed last; the manifest, without which there is no dataset, is written when all
other objects are there and have their sizes. So a kill at any moment leaves what the same recipe goes on with, on this
machine or another, or a finished dataset.
"""

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmt_shared.errors import ConfigError, StoreError
from llmt_shared.manifest import NAME, NOTE, read_manifest, wrong_files
from llmt_shared.objects import PART, ObjectPath, is_encrypted

_TRIES = 4
"""At an object that does not arrive as it was sent."""
_AT_ONCE = 8
WAY_OUT = "choose another `output`, or remove all objects below it first"
"""What to do about an output that cannot be written over."""


def check_free(output: ObjectPath) -> None:
    """Raise ConfigError where objects lie below a URL that no run has marked as a dataset, finished or not."""
    try:
        first = next((each.path for each in output.files()), None)
    except FileNotFoundError as error:
        raise ConfigError(f"{output}: {error.strerror}; make it, or choose another `output`") from None
    if first is not None and not (output / NAME).exists() and not (output / NOTE).exists():
        raise ConfigError(f"{output}: holds {first}, and is no dataset; wanted a URL with nothing below it as `output`")


def check_note(output: ObjectPath, recipe: str) -> None:
    """Raise ConfigError where an unfinished dataset of another recipe is below a URL."""
    try:
        note: dict[str, Any] = json.loads((output / NOTE).read_bytes())
        is_ours = note["recipe"] == recipe
    except FileNotFoundError:
        return
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"{output / NOTE}: not written by llmt-prep; {WAY_OUT}") from None
    if not is_ours:
        raise ConfigError(
            f"{output}: holds an unfinished dataset made from another mix, input or tokenizer (by process "
            f"{note.get('process')} on {note.get('host')}, since {note.get('started')}); {WAY_OUT}"
        )


def claim(output: ObjectPath, recipe: str) -> None:
    """Leave the note, or find that it is there.

    Raises:
        ConfigError: it is of another recipe.
    """
    started = time.strftime("%Y-%m-%d %H:%M:%S%z")
    note = {"recipe": recipe, "host": socket.gethostname(), "process": os.getpid(), "started": started}
    try:
        (output / NOTE).write_bytes(json.dumps(note, indent=1).encode() + b"\n", is_new=True)
    except FileExistsError:  # of an earlier run, or our own, whose answer was lost
        check_note(output, recipe)


def release(output: ObjectPath) -> None:
    """Remove the note."""
    (output / NOTE).unlink()


def publish(output: ObjectPath, data: Path) -> None:
    """Upload what of a dataset lies in a folder, the manifest last, and remove the note.

    Raises:
        StoreError: an object that the manifest lists is missing, or is of another size.
    """
    manifest, _ = read_manifest(data)
    paths = [path for path in sorted(data.rglob("*")) if path.is_file() and path != data / NAME]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda path: upload(path, output / path.relative_to(data).as_posix()), paths))
    if problems := wrong_files(output, manifest):
        raise StoreError(f"{problems[0]}; {len(problems)} in all; run the same command again to make them again")
    upload(data / NAME, output / NAME)
    release(output)


def upload(path: Path, target: ObjectPath) -> None:
    """Write an object from a file, and see that it arrived as it is.

    The store's etag tells, where it is made of MD5s. Where it is something else over TLS, as of encrypted objects, TLS
    has told; else the object is read back.

    Raises:
        StoreError: it arrives otherwise each time.
    """
    wanted = _etag(path)
    for _ in range(_TRIES):
        etag = target.upload(path)
        is_told = re.fullmatch(r"[0-9a-f]{32}(-\d+)?", etag) is None and is_encrypted(target.url)
        if etag == wanted or is_told or _is_there(path, target):
            return
    raise StoreError(f"{target}: arrived otherwise than it was sent, each of {_TRIES} times; mend the network")


def _etag(path: Path) -> str:
    """What S3 calls a file that is sent in parts of `PART` bytes: the MD5 of their MD5s and how many they are."""
    parts = [hashlib.md5(part, usedforsecurity=False) for part in _parts(path)]
    if len(parts) == 1:
        return parts[0].hexdigest()
    joined = b"".join(part.digest() for part in parts)
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}"


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield file.read(PART)
        while part := file.read(PART):
            yield part


def _is_there(path: Path, target: ObjectPath) -> bool:
    size, state = path.stat().st_size, hashlib.sha256()
    if target.stat().st_size != size:
        return False
    for piece in target.pieces(size):
        state.update(piece)
    with path.open("rb") as file:
        return state.digest() == hashlib.file_digest(file, "sha256").digest()
