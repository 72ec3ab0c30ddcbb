"""The weights of a folder or a hub id by the model's own names for them: safetensors only, and read in parts.

Where a family's files have other names than its model, or lie in other pieces (experts one by one), transformers' rules
for that family are applied; a tensor made of several is then made whole, one at a time.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from llmt_shared.errors import ConfigError
from llmt_train.model.skeleton import LOADING_ERRORS, cannot_load, find_folder

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

Box = tuple[slice, ...]
"""Part of a tensor, one slice with both ends for each of its dims."""


class Stored(NamedTuple):
    """A tensor on disk."""

    shape: tuple[int, ...]
    read: Callable[[Box], Tensor]


def open_weights(name: str, skeleton: Any) -> dict[str, Stored]:
    """Return what is on disk for a model, by the names of its `state_dict`; of tied weights, one name may be missing.

    Args:
        name: a folder or a hub id.
        skeleton: the whole model on the meta device, as `load_skeleton` made it.

    Raises:
        ConfigError: there are no weights in *.safetensors, or they cannot be read.
    """
    path, is_folder = find_folder(name)
    try:
        folder = path if is_folder else _download(name)
        return _named(_open(folder), skeleton)
    except LOADING_ERRORS as error:
        raise ConfigError(cannot_load(name, is_folder, error)) from error


def _download(name: str) -> Path:
    """Folder of the hub's cache that holds the model's files, all of one commit."""
    folder = Path(snapshot_download(name, allow_patterns=["*.json", _WHOLE]))
    if not (folder / _WHOLE).is_file() and (folder / _INDEX).is_file():
        snapshot_download(name, revision=folder.name, allow_patterns=_parts(folder))
    return folder


def _parts(folder: Path) -> list[str]:
    names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{_INDEX} names files outside the folder")
    return names


def _open(folder: Path) -> dict[str, Any]:
    """Open files by the keys of their tensors; nothing is read but the headers."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError("it holds adapters beside the model; merge them into it first")
    if not (folder / _WHOLE).is_file() and not (folder / _INDEX).is_file():
        raise FileNotFoundError(f"it holds neither {_WHOLE} nor {_INDEX}")
    names = [_WHOLE] if (folder / _WHOLE).is_file() else _parts(folder)
    files = [safe_open(folder / name, framework="pt") for name in names]
    return {key: file for file in files for key in file.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118


@dataclass
class _Pieces:
    """Tensors on disk that transformers makes one or more of the model's tensors of."""

    first: str
    """The model's name for the first of those that are made."""
    converter: Any
    keys: list[tuple[str, str]] = field(default_factory=list)
    """On disk, with the pattern that found each."""

    def make(self, skeleton: Any, load: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return what is made, by the model's names."""
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.keys:
            converter.add_tensor(self.first, key, pattern, partial(load, key))
        made = converter.convert(self.first, model=skeleton, config=skeleton.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _named(files: Mapping[str, Any], skeleton: Any) -> dict[str, Stored]:
    rules = get_model_conversion_mapping(skeleton)
    state, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    rename = partial(rename_source_key, base_model_prefix=prefix, meta_state_dict=state)
    found: dict[str, Stored] = {}
    pieces: dict[str, _Pieces] = {}
    for key in sorted(files, key=dot_natural_key):
        name, pattern = rename(key, [rule for rule in rules if isinstance(rule, WeightRenaming)], converters)
        if name not in state and key in state:  # it has the model's name already
            name, pattern = rename(key, [], [])
        if name in state and pattern is None:
            found[name] = _slice_of(files[key], key)
        elif name in state and pattern is not None:
            group = pieces.setdefault(name, _Pieces(name, by_pattern[pattern]))
            group.keys.append((key, pattern))
    return found | _made(pieces, files, skeleton, state)


def _slice_of(file: Any, key: str) -> Stored:
    part = file.get_slice(key)
    shape = tuple(part.get_shape())
    return Stored(shape, (lambda box: part[box]) if shape else (lambda _: file.get_tensor(key)))


def _made(pieces: Mapping[str, _Pieces], files: Mapping[str, Any], skeleton: Any, state: Any) -> dict[str, Stored]:
    @lru_cache(maxsize=1)  # those that are made together are asked for together
    def make(first: str) -> dict[str, Tensor]:
        dtype = state[first].dtype
        return pieces[first].make(skeleton, lambda key: files[key].get_tensor(key).to(dtype))

    found = {}
    for first, group in pieces.items():
        shapes = group.make(skeleton, lambda key: torch.empty(files[key].get_slice(key).get_shape(), device="meta"))
        for name, tensor in shapes.items():
            found[name] = Stored(
                tuple(tensor.shape), partial(lambda first, name, box: make(first)[name][box], first, name)
            )
    return found
