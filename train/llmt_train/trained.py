"""The model of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmt_shared.errors import ConfigError, FormatError
from llmt_train import checkpoints
from llmt_train.attention import NAME, register
from llmt_train.config import LoraConfig
from llmt_train.model.adapt import resize_embeddings
from llmt_train.model.adapters import add_adapters
from llmt_train.model.draw import set_buffers
from llmt_train.model.fill import materialise
from llmt_train.model.fused import disk_names, split_fused
from llmt_train.model.load import load_model
from llmt_train.reference import fingerprint


def load_checkpoint_model(checkpoint: Path) -> Any:
    """Return a checkpoint's model with its weights, in fp32 and evaluation mode, with our attention.

    Raises:
        ConfigError: its adapters belong to a model that cannot be loaded.
        FormatError: the weights are not those of the config beside them, or the adapters not of the model.
    """
    config = checkpoints.read_config(checkpoint)
    checkpoints.check_undamaged(checkpoint)
    if config.get("lora"):
        model = _adapted(checkpoint, config)
        checkpoints.read_model(checkpoint, model, trained_alone=True)
        return model.eval()
    model = load_checkpoint_skeleton(checkpoint)
    stored = checkpoints.StoredModel(checkpoint).shapes
    if any(len(parts) > 1 for parts in disk_names(model.config, stored).values()):
        split_fused(model)
    materialise(model, "cpu")
    set_buffers(model, lambda name, value: None)  # those that follow from the config: no checkpoint holds them
    try:
        checkpoints.read_model(checkpoint, model)
    except FormatError as error:
        raise FormatError(f"{checkpoint}: the weights do not fit config.json: {error}") from None
    return model.eval()


def load_checkpoint_skeleton(checkpoint: Path) -> Any:
    """Return a checkpoint's model without weights, on the meta device, its layers as transformers has them."""
    register()
    classes: Any = AutoModelForCausalLM
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    with torch.device("meta"):
        return classes.from_config(config, attn_implementation=NAME, dtype=torch.float32, trust_remote_code=False)


def _adapted(checkpoint: Path, config: Mapping[str, Any]) -> Any:
    """The model that a run with adapters began with, and fresh adapters."""
    if not isinstance(config["model"], str):
        raise ConfigError(f"{checkpoint}: its adapters belong to a model with drawn weights, which is nowhere on disk")
    dtype = torch.bfloat16 if config["precision"] == "bf16-true" else torch.float32
    model = load_model(config["model"], dtype=dtype)
    num_rows = checkpoints.read_json(checkpoint, checkpoints.MODEL_CONFIG).get("vocab_size", 0)
    resize_embeddings(model, num_rows)
    if fingerprint(model) != checkpoints.read_state(checkpoint).base:
        raise ConfigError(f"{checkpoint}: its adapters belong to other weights than {config['model']} has now")
    add_adapters(model.float(), LoraConfig.model_validate(config["lora"]), seed=0)
    return model
