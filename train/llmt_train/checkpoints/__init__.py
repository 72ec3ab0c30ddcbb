"""Checkpoints on disk: whole or not there, readable on any layout of devices, and nothing in them can run code."""

from llmt_train.checkpoints.damage import check_undamaged, set_damaged_aside
from llmt_train.checkpoints.folders import (
    MODEL_CONFIG,
    RUN_CONFIG,
    TENSORS,
    TRAINER,
    State,
    best_checkpoints,
    find_checkpoint,
    newest_checkpoint,
    prune,
    read_config,
    read_json,
    read_state,
)
from llmt_train.checkpoints.resumable import check_resumable
from llmt_train.checkpoints.saver import Saver
from llmt_train.checkpoints.training import (
    Snapshot,
    StoredModel,
    load_training,
    read_model,
    save_training,
    take,
)
from llmt_train.checkpoints.writing import copy_files, save_checkpoint, stopped_by_full_disk

__all__ = [
    "MODEL_CONFIG",
    "RUN_CONFIG",
    "TENSORS",
    "TRAINER",
    "Saver",
    "Snapshot",
    "State",
    "StoredModel",
    "best_checkpoints",
    "check_resumable",
    "check_undamaged",
    "copy_files",
    "find_checkpoint",
    "load_training",
    "newest_checkpoint",
    "prune",
    "read_config",
    "read_json",
    "read_model",
    "read_state",
    "save_checkpoint",
    "save_training",
    "set_damaged_aside",
    "stopped_by_full_disk",
    "take",
]
