"""What must not change between a checkpoint and the run that goes on from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmt_shared.errors import ConfigError
from llmt_train.checkpoints.folders import MODEL_CONFIG, State, read_config, read_json, read_state

_MAY_CHANGE = (
    *(
        "output",
        "data",
        "cache",
        "eval",
        "save",
        "log",
        "wandb",
        "mlflow",
        "sample",
        "precision",
        "attention",
        "parallel",
    ),
    *("batch.micro_rows", "optim.clip", "train.checkpointing", "train.compile", "train.liger"),
)
_MAY_GROW = ("train.steps", "train.epochs")


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
