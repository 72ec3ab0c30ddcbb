"""Folders `checkpoints/step-00000200/`: which are whole, which is newest or best, which go, and what lies in one.

A checkpoint has weights and optimizer state (``tensors/``, see `sharded`), the trainer's counts (trainer.pt: plain
data that loads with ``weights_only=True``), the resolved config, the model's config.json, the environment it was made
in, and ``state.json``, which is written last and lists the sizes and checksums of the others.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from llmt_shared.config import StrictModel
from llmt_shared.errors import ConfigError, FormatError

TENSORS = "tensors"
"""Folder of weights and optimizer state."""
TRAINER = "trainer.pt"
"""Schedule, counts, and what of an optimizer is no tensor."""
RUN_CONFIG = "config.yaml"
"""The run's resolved config."""
MODEL_CONFIG = "config.json"
"""The model's Hugging Face config."""
STATE = "state.json"
FOLDER = "checkpoints"
"""Of a run's output."""
FORMAT = 2
"""1 was one file of Lightning's."""


class State(StrictModel):
    """state.json: where a run stands. The order of rows is a function of these, so resuming needs nothing else."""

    format: int = 1
    """How the checkpoint is laid out; the first did not say."""
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
    checksums: dict[str, int] = Field(default_factory=dict)
    """Name and CRC-32 of every other file."""


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run; torn ones (killed, truncated) are passed over.

    Raises:
        FormatError: it was made by another version, which laid it out otherwise.
    """
    newest = next(complete_checkpoints(run_dir), None)
    if newest is not None:
        _check_format(newest)
    return newest


def complete_checkpoints(run_dir: Path) -> Iterator[Path]:
    """Yield the complete checkpoints of a run, newest first."""
    return filter(_is_complete, _folders(run_dir))


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, or the newest one of a run.

    Raises:
        ConfigError: no such folder.
        FormatError: neither; or one with files missing or truncated, or made by another version.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; wanted the `output` of `llmt-train fit` or a step-* folder")
    if (path / STATE).exists():
        if not _is_complete(path):
            raise FormatError(f"{path}: files of this checkpoint are missing or truncated; use another step's")
        _check_format(path)
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise FormatError(f"{path}: no complete checkpoint; wanted the `output` of `llmt-train fit` or a step-* folder")
    return newest


def read_state(folder: Path) -> State:
    """Return a checkpoint's state.

    Raises:
        FormatError: state.json is missing or damaged.
    """
    try:
        return State.model_validate_json((folder / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise FormatError(f"{folder}/{STATE}: {str(error).splitlines()[0]}") from None


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
    folders = reversed(list(complete_checkpoints(run_dir)))
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
    kept = list(complete_checkpoints(run_dir))[:keep]  # a torn one must not take a whole one's place
    kept += best_checkpoints(run_dir, keep_best)
    for folder in [*folders, *(run_dir / FOLDER).glob(".step-*.partial")]:
        if folder not in kept:
            shutil.rmtree(folder)


def _folders(run_dir: Path) -> list[Path]:
    """Folders named as checkpoints are, newest first."""
    named = [path for path in (run_dir / FOLDER).glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(filter(Path.is_dir, named), key=lambda path: int(path.name[5:]), reverse=True)


def _is_complete(folder: Path) -> bool:
    try:
        state = read_state(folder)
        sizes = {name: (folder / name).stat().st_size for name in state.files}
    except (OSError, FormatError):
        return False
    return bool(sizes) and sizes == state.files


def _check_format(folder: Path) -> None:
    found = read_state(folder).format
    if found != FORMAT:
        age = "an earlier" if found < FORMAT else "a later"
        raise FormatError(
            f"{folder}: made by {age} version of llmt (format {found}; this one reads {FORMAT}); finish the run or "
            "export it with that version, or start over with --force"
        )


def clear(folder: Path) -> None:
    """Remove a folder, if there is one."""
    if folder.exists():
        shutil.rmtree(folder)
