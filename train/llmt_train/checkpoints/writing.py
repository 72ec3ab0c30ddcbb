"""How a checkpoint is made: under a temporary name, put on the disk and renamed, so a kill leaves the one before it.

All ranks write into one folder; the first one makes, describes, renames and removes.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from llmt_shared import durable
from llmt_shared.errors import Stopped
from llmt_train.checkpoints.damage import Print, print_of
from llmt_train.checkpoints.folders import FOLDER, FORMAT, STATE, State, clear, newest_checkpoint, read_state
from llmt_train.parallel.together import by_first, own_rank, together
from llmt_train.watch.environment import environment

Documents = Mapping[str, Mapping[str, Any]]
"""Plain data to lie beside the weights, by file name: YAML or JSON."""


def save_checkpoint(run_dir: Path, state: State, documents: Documents, write: Callable[[Path], Iterable[Path]]) -> Path:
    """Write one checkpoint, all ranks together, and return its folder.

    Args:
        run_dir: the run's output folder.
        state: what the first rank knows; its format, files and checksums are filled in here.
        documents: the first rank's.
        write: writes this rank's part into a folder and returns the files that it wrote; where it fails on one rank, it
            raises on all.

    Raises:
        OSError: the checkpoint cannot be written; those before it are untouched.
    """
    with begun(run_dir, state.step) as temporary:
        return complete(temporary, state, documents, write(temporary))


@contextmanager
def begun(run_dir: Path, step: int) -> Iterator[Path]:
    """Make the temporary folder of a step's checkpoint; it is gone in the end, renamed or removed."""
    temporary = run_dir / FOLDER / f".{_name(step)}.partial"
    try:
        by_first(partial(_make, temporary))
        yield temporary
    finally:
        if own_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def complete(temporary: Path, state: State, documents: Documents, files: Iterable[Path]) -> Path:
    """Put what all ranks wrote on the disk, describe it and rename the folder; return what it is called then.

    Args:
        temporary: from `begun`.
        state: see `save_checkpoint`.
        documents: see `save_checkpoint`.
        files: those that this rank wrote.
    """
    prints: dict[str, Print] = {}
    for own in together(lambda: {str(path.relative_to(temporary)): _settled(path) for path in files}):
        prints |= own
    return by_first(partial(_publish, temporary, state, documents, prints))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _make(folder: Path) -> None:
    clear(folder)
    folder.mkdir(parents=True)


def _publish(temporary: Path, state: State, documents: Documents, prints: dict[str, Print]) -> Path:
    final = temporary.with_name(_name(state.step))
    for name, document in (dict(documents) | {"environment.json": environment()}).items():
        (_write_yaml if name.endswith(".yaml") else _write_json)(temporary / name, document)
        prints[name] = _settled(temporary / name)
    sizes = {name: found.size for name, found in prints.items()}
    checksums = {name: found.checksum for name, found in prints.items()}
    whole = state.model_copy(update={"format": FORMAT, "files": sizes, "checksums": checksums})
    _write_json(temporary / STATE, whole.model_dump())
    _settled(temporary / STATE)
    for folder in {temporary, *((temporary / name).parent for name in prints)}:
        durable.sync_directory(folder)
    clear(final)  # one of the same step is there only if it was found torn
    temporary.rename(final)
    durable.sync_directory(final.parent)
    return final


def _settled(path: Path) -> Print:
    """Put a file on the disk, whatever the machine does next."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return print_of(path)


def copy_files(source: Path, target: Path) -> None:
    """Copy a folder's files over another's, at any depth; `shutil.copytree` would hide why one cannot be written."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


@contextmanager
def stopped_by_full_disk(run_dir: Path) -> Iterator[None]:
    """Turn a full disk (or quota) into `Stopped`: the newest checkpoint is whole, so the run can go on from it."""
    try:
        yield
    except OSError as error:
        if not durable.is_full_disk(error):
            raise
        newest = newest_checkpoint(run_dir)
        kept = f"saved up to step {read_state(newest).step}" if newest else "nothing is saved yet"
        where = f" while writing {error.filename}" if error.filename else ""
        raise Stopped(
            f"{run_dir}: no room left on the disk{where} ({error.strerror}); {kept}; make room and run the same "
            f"command again to resume"
        ) from None


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.representer.sort_base_mapping_type_on_output = False
    with path.open("w") as file:
        yaml.dump(data, file)
