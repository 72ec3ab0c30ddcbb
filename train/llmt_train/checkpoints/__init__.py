"""Checkpoints on disk: `checkpoints/step-00000200/`, whole or not there, and what must not change to resume from one.

A checkpoint is written under a temporary name, put on the disk and renamed, so a kill leaves the one before it. It
holds Lightning's file (tensors and plain containers: it loads with `weights_only=True`), the resolved config, the
model's config.json, the environment it was made in, and `state.json`, which also lists the sizes of the others.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from llmt_shared import durable
from llmt_shared.config import StrictModel
from llmt_shared.errors import ConfigError, FormatError, Stopped
from llmt_train.watch.environment import environment

WEIGHTS = "lightning.ckpt"
"""Lightning's file: weights, optimizer state, schedule, counts."""
RUN_CONFIG = "config.yaml"
"""The run's resolved config."""
MODEL_CONFIG = "config.json"
"""The model's Hugging Face config."""
_FOLDER = "checkpoints"
_MAY_CHANGE = (
    *("output", "data", "eval", "save", "log", "wandb", "mlflow", "sample", "precision", "attention", "parallel"),
    *("batch.micro_rows", "optim.clip", "train.checkpointing", "train.compile", "train.liger"),
)
_MAY_GROW = ("train.steps", "train.epochs")


class State(StrictModel):
    """state.json: where a run stands. The order of rows is a function of these, so resuming needs nothing else."""

    step: int
    """Optimizer steps done."""
    rows_consumed: int
    """Rows that these steps took."""
    rows_per_step: int
    digest: str
    """The dataset's."""
    seed: int
    base: str | None = None
    """Fingerprint of the weights that the run began with, where the checkpoint does not hold them all."""
    eval_loss: float | None = None
    """Held-out loss after these steps; ``None`` where there was no evaluation, or its loss is not finite."""
    files: dict[str, int] = Field(default_factory=dict)
    """Name and bytes of every other file of the checkpoint."""


def save_checkpoint(
    run_dir: Path, state: State, documents: dict[str, dict[str, Any]], write: Callable[[Path], None]
) -> Path:
    """Write one checkpoint and return its folder.

    Args:
        run_dir: the run's output folder.
        state: its ``files`` are filled in here.
        documents: plain data to lie beside the weights, by file name: YAML or JSON.
        write: writes the trainer's checkpoint to a path.

    Raises:
        OSError: the checkpoint cannot be written; those before it are untouched.
    """
    final = run_dir / _FOLDER / f"step-{state.step:08d}"
    temporary = final.with_name(f".{final.name}.partial")
    try:
        _clear(temporary)
        temporary.mkdir(parents=True)
        write(temporary / WEIGHTS)
        for name, document in (documents | {"environment.json": environment()}).items():
            (_write_yaml if name.endswith(".yaml") else _write_json)(temporary / name, document)
        sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
        _write_json(temporary / "state.json", state.model_copy(update={"files": sizes}).model_dump())
        _sync(temporary)
        _clear(final)  # one of the same step is there only if it was found torn
        temporary.rename(final)
        durable.sync_directory(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


class WeightsFile(TorchCheckpointIO):
    """Lightning's file, written where it belongs.

    Lightning's own writer builds the file in memory and takes it through the system's temporary folder, which may be
    too small, lie on another disk, and keeps what a kill leaves there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write; raises OSError where the system refuses."""
        del storage_options
        try:
            with Path(path).open("wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """Read into memory; see `read_weights`."""
        del map_location, weights_only
        return read_weights(Path(path))


def read_weights(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Return the content of a trainer's checkpoint, on the CPU; nothing in it can run code.

    Args:
        path: the file.
        mmap: leave the tensors on the disk until they are used.

    Raises:
        FormatError: it is damaged, or holds more than tensors and plain containers.
    """
    reason = _damage(path)
    try:
        if reason is None:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            return content
    except pickle.UnpicklingError:
        reason = "it holds something else than tensors and plain data"
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise FormatError(f"{path}: cannot be read: {reason}; remove this step's folder, and the one before it serves")


def _damage(path: Path) -> str | None:
    """What is wrong with the bytes of a file that `torch.save` wrote: torch itself never looks at its checksums.

    A file that may not be read is not damaged: that is an OSError, and nothing is set aside for it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (PermissionError, BlockingIOError):
        raise
    except Exception as error:  # a flipped bit of its directory may name another encoding, compression or password
        return str(error).strip() or type(error).__name__
    return None if damaged is None else f"the checksum of {damaged} in it is wrong"


def set_damaged_aside(run_dir: Path) -> list[str]:
    """Rename the newest checkpoints whose weights are damaged, up to the first sound one, so that nothing uses them.

    Returns:
        What was found and where it lies now, a line for each.
    """
    found = []
    for folder in filter(_is_complete, _folders(run_dir)):
        reason = _damage(folder / WEIGHTS)
        if reason is None:
            break
        aside = folder.with_name(f"damaged-{folder.name}")
        _clear(aside)
        folder.rename(aside)
        found.append(f"{folder}: {reason}; set aside as {aside.name}, the checkpoint before it is used")
    return found


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


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run; torn ones (killed, truncated) are passed over."""
    return next((folder for folder in _folders(run_dir) if _is_complete(folder)), None)


def _folders(run_dir: Path) -> list[Path]:
    """Folders named as checkpoints are, newest first."""
    named = [path for path in (run_dir / _FOLDER).glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(filter(Path.is_dir, named), key=lambda path: int(path.name[5:]), reverse=True)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, or the newest one of a run.

    Raises:
        ConfigError: no such folder.
        FormatError: neither; or one with files missing or truncated.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; wanted the `output` of `llmt-train fit` or a step-* folder")
    if (path / "state.json").exists():
        if not _is_complete(path):
            raise FormatError(f"{path}: files of this checkpoint are missing or truncated; use another step's")
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise FormatError(f"{path}: no complete checkpoint; wanted the `output` of `llmt-train fit` or a step-* folder")
    return newest


def _is_complete(folder: Path) -> bool:
    try:
        files = read_state(folder).files
        return WEIGHTS in files and all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, FormatError):
        return False


def read_state(folder: Path) -> State:
    """Return a checkpoint's state.

    Raises:
        FormatError: state.json is missing or damaged.
    """
    try:
        return State.model_validate_json((folder / "state.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise FormatError(f"{folder}/state.json: {str(error).splitlines()[0]}") from None


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return one of a checkpoint's JSON files.

    Raises:
        FormatError: it is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads((folder / name).read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder / name}: {error}") from None
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's resolved run config, as plain data.

    Raises:
        FormatError: config.yaml is missing or damaged.
    """
    try:
        config: dict[str, Any] = YAML(typ="safe", pure=True).load((folder / RUN_CONFIG).read_text())
    except (OSError, YAMLError) as error:
        raise FormatError(f"{folder}/{RUN_CONFIG}: {str(error).splitlines()[0]}") from None
    return config


def best_checkpoints(run_dir: Path, count: int) -> list[Path]:
    """Return the complete checkpoints with the lowest held-out losses, best first; of equal ones the earlier."""
    folders = filter(_is_complete, reversed(_folders(run_dir)))
    losses = [(loss, folder) for folder in folders if (loss := read_state(folder).eval_loss) is not None]
    return [folder for _, folder in sorted(losses, key=lambda pair: pair[0])[:count]]


def prune(run_dir: Path, keep: int, keep_best: int = 0) -> None:
    """Remove all but some complete checkpoints, and what killed runs left of unfinished ones.

    Args:
        run_dir: the run's output folder.
        keep: how many of the newest stay.
        keep_best: how many of those with the lowest held-out losses stay, be they among the newest or not.
    """
    folders = _folders(run_dir)
    kept = [folder for folder in folders if _is_complete(folder)][:keep]  # a torn one must not take a whole one's place
    kept += best_checkpoints(run_dir, keep_best)
    for folder in [*folders, *(run_dir / _FOLDER).glob(".step-*.partial")]:
        if folder not in kept:
            shutil.rmtree(folder)


def check_resumable(folder: Path, state: State, config: Mapping[str, Any], model_config: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint with settings that would make it another run.

    Args:
        folder: the checkpoint.
        state: where a run with the new settings would stand after the same steps.
        config: the new run config, as plain data.
        model_config: the new model's config, as plain data.

    Raises:
        ConfigError: naming each setting with its old and new value.
    """
    old = read_state(folder)
    differences = [
        *_difference("dataset digest", old.digest[:16], state.digest[:16]),
        *_difference("rows of a step", old.rows_per_step, state.rows_per_step),
        *_difference("weights that the run began with", (old.base or "")[:16], (state.base or "")[:16]),
        *_difference("rows of all steps (the last one was short)", old.rows_consumed, state.rows_consumed),
        *_changed_settings(read_config(folder), config),
    ]
    before, now = _comparable(read_json(folder, MODEL_CONFIG)), _comparable(model_config)
    for key in sorted(before.keys() & now.keys()):  # another release of transformers may have further keys
        differences += _difference(f"model's {key}", before[key], now[key])
    if differences:
        raise ConfigError(
            f"{folder}: cannot resume, because this is another run now:\n  " + "\n  ".join(differences) + "\n"
            "Restore these settings, choose another `output`, or start over with --force"
        )


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = _flat(before), _flat(now)
    changed = []
    for key in sorted(old.keys() | new.keys()):
        if any(key == free or key.startswith(f"{free}.") for free in (*_MAY_CHANGE, *_MAY_GROW)):
            continue
        changed += _difference(key, old.get(key), new.get(key))
    return changed


def _difference(name: str, before: object, now: object) -> list[str]:
    return [] if before == now else [f"{name}: {before!r} in the checkpoint, {now!r} now"]


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _comparable(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config without what says nothing of its weights."""
    skipped = ("transformers_version", "_name_or_path", "dtype", "use_cache")
    return {key: value for key, value in json.loads(json.dumps(model_config)).items() if key not in skipped}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.representer.sort_base_mapping_type_on_output = False
    with path.open("w") as file:
        yaml.dump(data, file)


def _clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    durable.sync_directory(folder)
