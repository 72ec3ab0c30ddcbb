"""Where a model comes from: a folder, the hub or a config; packed attention, safetensors only, no remote code."""

import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from llmt_shared.errors import ConfigError
from llmt_train.attention import NAME, Backend, Segments, register
from llmt_train.data.batch import PackedBatch, Text, pack_texts
from llmt_train.parallel.collectives import gather_same
from llmt_train.parallel.context import WHOLE, TokenSplit

_LEGACY_KEYS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype"})
"""Keys of older config.json files that transformers still takes where the class has their successor."""

_LOADING = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
"""What transformers raises where a model cannot be loaded."""


def load_model(spec: str | Mapping[str, Any], *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a causal language model in training mode, its attention keeping segments apart.

    Args:
        spec: a folder or a hub id, whose weights are loaded; or ``{"from_config": {"model_type": .., key: ..}}``,
            whose weights are drawn.
        dtype: of the parameters.
        seed: of the drawn weights; torch's own generator is left as it was.

    Raises:
        ConfigError: no such folder or id; no safetensors; code of its own; an unknown model type or key; values that
            do not fit together; layers that packed attention has not.
    """
    register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _pretrained(spec, dtype) if isinstance(spec, str) else _drawn(spec["from_config"], dtype)
    _check_layers(model.config)
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


def load_skeleton(spec: str | Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model that `load_model` would return, as far as its config says: without weights, on the meta device.

    Raises:
        ConfigError: as `load_model`, but for what only the weights tell.
    """
    register()
    with torch.device("meta"):
        if isinstance(spec, str):
            model = _build(_read_config(spec), dtype, f"model: {spec}: ")
        else:
            model = _drawn(spec["from_config"], dtype)
    _check_layers(model.config)
    model.config.use_cache = False
    return model.train()


def forward_hidden(model: Any, batch: PackedBatch, segments: Segments | None = None) -> Tensor:
    """Return what the output layer reads: the decoder's last hidden states, [N, H], of the tokens that this rank has.

    Args:
        model: from `load_model`.
        batch: the micro-batch.
        segments: those of the batch, with a backend of choice; ``None`` takes the batch's with ``auto``.
    """
    output = model.get_decoder()(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        segments=batch.segments() if segments is None else segments,
        use_cache=False,
    )
    return cast("Tensor", output.last_hidden_state[0])


@torch.no_grad()
def whole_logits(
    model: Any,
    texts: Sequence[Text],
    *,
    device: torch.device | str | None = None,
    attention: Backend = "auto",
    deterministic: bool = False,
    split: TokenSplit = WHOLE,
) -> Tensor:
    """Return the model's own logits of texts packed into one row, the same on every rank: [N, V], N tokens together.

    Args:
        model: from `load_model`; if it is cut over devices, all its ranks call this.
        texts: tokens of each; any number.
        device: where the model computes; ``None`` is where its embeddings lie.
        attention: backend of the attention, or ``auto``.
        deterministic: see `varlen_attention`.
        split: ranks that share the model's layers and tokens.
    """
    place = model.get_input_embeddings().weight.device if device is None else device
    batch = pack_texts(texts, split).to(place)
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        segments=batch.segments(attention, deterministic),
        use_cache=False,
    )
    return gather_same(output.logits[0], split.cp, 0)[: sum(len(text) for text in texts)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets back the mode it had.

    Sharded weights that the last forward pass gathered are let go of: no backward pass comes that would do it.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
            if isinstance(module, FSDPModule):
                module.reshard()


def _find(name: str) -> tuple[Path, bool]:
    """The folder that a model's name may be of, and whether it is there."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_local and not path.is_dir():
        raise ConfigError(f"model: {name}: no such folder; wanted a folder with config.json and *.safetensors")
    return path, path.is_dir()


def _read_config(name: str) -> PreTrainedConfig:
    """Config of a folder or a hub id; a folder must have weights, which are not read."""
    path, is_folder = _find(name)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path) if is_folder else name, trust_remote_code=False)
    except _LOADING as error:
        raise ConfigError(_cannot_load(name, is_folder, error)) from error
    if is_folder and not any(path.glob("*.safetensors")):
        raise ConfigError(_cannot_load(name, is_folder, FileNotFoundError("it holds no *.safetensors")))
    return config


def _cannot_load(name: str, is_folder: bool, error: Exception) -> str:
    where = "in this folder" if is_folder else "from the hub (nor is there such a folder)"
    return (
        f"model: {name}: cannot be loaded {where}: {_first_line(error)}; wanted a causal language model with its "
        "weights in *.safetensors and no code of its own"
    )


def _pretrained(name: str, dtype: torch.dtype) -> Any:
    path, is_folder = _find(name)
    model_class: Any = AutoModelForCausalLM
    try:
        model, loading = model_class.from_pretrained(
            str(path) if is_folder else name,
            dtype=dtype,
            attn_implementation=NAME,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
        )
    except _LOADING as error:
        raise ConfigError(_cannot_load(name, is_folder, error)) from error
    if loading["mismatched_keys"]:
        key, found, wanted = sorted(loading["mismatched_keys"])[0]
        raise ConfigError(
            f"model: {name}: {key} is {list(found)} in *.safetensors, but {list(wanted)} by config.json; "
            "wanted a config.json and weights that belong together"
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"model: {name}: {', '.join(missing[:3])}{more} of {type(model).__name__} are not in its *.safetensors; "
            "wanted the weights of a whole causal language model"
        )
    return model


def _drawn(keys: Mapping[str, Any], dtype: torch.dtype) -> Any:
    return _build(_config(dict(keys)), dtype, "model: from_config: ")


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


def _check_layers(config: PreTrainedConfig) -> None:
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
