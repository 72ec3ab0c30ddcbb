"""A model without weights, from a folder, the hub or a config; packed attention, no remote code."""

import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
)

from llmt_shared.errors import ConfigError
from llmt_train.attention import NAME, register

_LEGACY_KEYS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype"})
"""Keys of older config.json files that transformers still takes where the class has their successor."""

LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
"""What transformers raises where a model cannot be loaded."""


def load_skeleton(spec: str | Mapping[str, Any], *, dtype: torch.dtype = torch.float32, device: str = "meta") -> Any:
    """Return the model that `load_model` would return, as far as its config says: without weights, on the meta device.

    Args:
        spec: see `load_model`.
        dtype: see `load_model`.
        device: where it is built; on any but the meta device transformers draws weights, from torch's own generator.

    Raises:
        ConfigError: as `load_model`, but for what only the weights tell.
    """
    register()
    with torch.device(device):
        if isinstance(spec, str):
            model = _build(_read_config(spec), dtype, f"model: {spec}: ")
            _read_generation(model, spec)
            _keep_fp32(model, dtype)
        else:
            model = _build(_config(dict(spec["from_config"])), dtype, "model: from_config: ")
    check_layers(model.config)
    model.config.use_cache = False  # a cache makes transformers treat the row as one document
    return model.train()


def vocab_size(spec: str | Mapping[str, Any]) -> int:
    """Return how many tokens a model knows, without loading its weights; a config that does not say has its family's.

    Raises:
        ConfigError: as `load_model`.
    """
    if not isinstance(spec, str):
        return int(_config(dict(spec["from_config"])).get_text_config().vocab_size)
    try:
        config = AutoConfig.from_pretrained(str(Path(spec).expanduser()), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model: {spec}: its config.json cannot be read: {_first_line(error)}") from error
    return int(config.get_text_config().vocab_size)


def find_folder(name: str) -> tuple[Path, bool]:
    """The folder that a model's name may be of, and whether it is there."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_local and not path.is_dir():
        raise ConfigError(f"model: {name}: no such folder; wanted a folder with config.json and *.safetensors")
    return path, path.is_dir()


def _read_config(name: str) -> PreTrainedConfig:
    """Config of a folder or a hub id; a folder must have weights, which are not read."""
    path, is_folder = find_folder(name)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path) if is_folder else name, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise ConfigError(cannot_load(name, is_folder, error)) from error
    if is_folder and not any(path.glob("*.safetensors")):
        raise ConfigError(cannot_load(name, is_folder, FileNotFoundError("it holds no *.safetensors")))
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        refusal = ValueError(f"its weights are quantized ({_method(quantization)}), and such cannot be trained")
        raise ConfigError(cannot_load(name, is_folder, refusal))
    return config


def _method(quantization: Any) -> str:
    found = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(found, "value", found))


def cannot_load(name: str, is_folder: bool, error: Exception) -> str:
    """Return what is said of a model for which transformers raised ``error``."""
    where = "in this folder" if is_folder else "from the hub (nor is there such a folder)"
    return (
        f"model: {name}: cannot be loaded {where}: {_first_line(error)}; wanted a causal language model with its "
        "weights in *.safetensors and no code of its own"
    )


def _read_generation(model: Any, name: str) -> None:
    """Take over generation_config.json, where there is one."""
    if model.can_generate():
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(str(Path(name).expanduser()))


def _keep_fp32(model: Any, dtype: torch.dtype) -> None:
    """Give fp32 to what a family wants in it whatever the rest is, such as the biases of routers."""
    plan = model._get_dtype_plan(dtype)
    if plan:
        wanted = re.compile("|".join(pattern.replace("*", ".*") for pattern in plan))
        for name, tensor in model.state_dict(keep_vars=True).items():
            if wanted.search(name):
                tensor.data = tensor.data.float()


def _build(config: PreTrainedConfig, dtype: torch.dtype, place: str) -> Any:
    try:
        model_class: Any = AutoModelForCausalLM
        return model_class.from_config(config, dtype=dtype, attn_implementation=NAME, trust_remote_code=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # model classes check little themselves: whatever they raise, the config made it so
        raise ConfigError(f"{place}{config.model_type} cannot be built: {_first_line(error)}") from error


def _config(keys: dict[str, Any]) -> PreTrainedConfig:
    model_type = keys.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        near = _nearest(str(model_type), list(CONFIG_MAPPING.keys()))
        raise ConfigError(f"model: from_config: model_type {model_type!r} is not known to transformers{near}")
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"model: from_config: {model_type} has no causal language model in transformers")
    known = _known_keys(config_class)
    unknown = [f"{key!r}{_nearest(key, sorted(known))}" for key in keys if key not in known]
    if unknown:
        raise ConfigError(
            f"model: from_config: {model_type} has no {'; no '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    try:
        return AutoConfig.for_model(model_type, **keys)
    except Exception as error:  # transformers validates with an exception class of its own
        raise ConfigError(f"model: from_config: {model_type}: {_last_line(error)}") from error


def check_layers(config: PreTrainedConfig) -> None:
    """Refuse what reaches an attention function only through its mask, which packed attention does not read."""
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        raise ConfigError(
            f"model: {config.model_type}: has layers with chunked attention, which packed attention does not have and "
            "would silently replace by full attention; choose a model without them"
        )


def _known_keys(config_class: Any) -> set[str]:
    """Keys that mean something to a config class; transformers stores any other one and never reads it.

    Beside the class's own there are those that its model reads without their being declared: Qwen3-MoE's head_dim.
    """
    fields = {field.name for field in dataclasses.fields(config_class) if not field.name.startswith("_")}
    code = inspect.getsource(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[config_class].__module__])
    read = set(re.findall(r'getattr\((?:self\.)?config, "([a-z]\w*)"', code))
    known = fields | read | set(config_class.attribute_map)
    return known | _LEGACY_KEYS if "rope_parameters" in fields else known | {"torch_dtype"}


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args == (NAME,):  # a table of attention classes, as falcon has
        return "its attention is its own and takes no other, so packed documents could not be kept apart"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip().rstrip(".")
