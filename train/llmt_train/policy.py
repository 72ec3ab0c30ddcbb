"""The model that trains and the reference beside it: loaded, changed, laid out over devices, proven."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from llmt_shared.progress import say
from llmt_train.config import FromConfig, RunConfig
from llmt_train.data.batch import PackedBatch
from llmt_train.data.rows import AnyDataset
from llmt_train.model.adapt import choose_trained, resize_embeddings
from llmt_train.model.adapters import without_adapters
from llmt_train.model.head import HeadSpec, find_head
from llmt_train.model.isolation import check_isolation
from llmt_train.model.liger import use_liger
from llmt_train.model.load import load_model
from llmt_train.parallel.context import TokenSplit
from llmt_train.parallel.mesh import Mesh
from llmt_train.parallel.sharding import shard
from llmt_train.parallel.tensor import tensor_parallel
from llmt_train.reference import live_reference


def open_model(config: RunConfig, dataset: AnyDataset) -> Any:
    """Load the model as it is before anything is changed for training, after the checks that need no weights."""
    model = load_model(spec_of(config, dataset), dtype=dtype_of(config), seed=config.train.seed)
    if config.train.resize_embeddings:
        resize_embeddings(model, dataset.tokenizer.max_id + 1)
    return model.to(device())


def open_policy(model: Any, config: RunConfig, mesh: Mesh) -> HeadSpec | None:
    """Decide what of a model trains, lay it out, and prove it; return how it makes its logits, where that is known."""
    choose_trained(model, config.train, config.lora)
    return lay_out(model, config, mesh)


def lay_out(model: Any, config: RunConfig, mesh: Mesh) -> HeadSpec | None:
    """Lay a model out over devices; prove that packed documents are isolated in it; find how it makes its logits."""
    compute, split = torch.bfloat16 if uses_bf16(config) else None, split_of(config, mesh)
    if mesh.layout.tp > 1:
        tensor_parallel(model, mesh, sp=config.parallel.sp)
    shard(model, mesh, compute=compute, offload=config.parallel.offload)
    check_isolation(model, attention=config.attention, compute=compute, split=split, device=torch.device(device()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head = find_head(model, split)
    for warning in caught:
        say(f"note: {warning.message}")
    return head


def split_of(config: RunConfig, mesh: Mesh) -> TokenSplit:
    """Return which ranks share the tokens of a micro-batch."""
    return TokenSplit(mesh.tp, mesh.cp, config.parallel.sp and mesh.layout.tp > 1)


Logps = Callable[[PackedBatch], Tensor]
"""A reference: from a micro-batch to the log-probabilities of its pairs, [Q, 2]."""


def frozen_reference(model: Any, config: RunConfig, mesh: Mesh) -> Logps:
    """Return the reference that a model is, as `open_model` gives it: it never changes."""
    model.requires_grad_(False).eval()
    if config.train.liger:
        use_liger(model)
    head = lay_out(model, config, mesh)
    return live_reference(model, head, attention=config.attention, deterministic=config.train.deterministic)


def adapterless_reference(model: Any, head: HeadSpec | None, config: RunConfig) -> Logps:
    """Return the reference that a policy is without its adapters."""
    return live_reference(
        model,
        head,
        attention=config.attention,
        deterministic=config.train.deterministic,
        without_adapters=partial(without_adapters, model),
    )


def needs_first_weights(config: RunConfig) -> bool:
    """Return whether what the run is depends, beyond its checkpoints, on the weights that it begins with."""
    return config.lora is not None or (config.task == "dpo" and config.dpo.reference != "none")


def model_name(config: RunConfig) -> str:
    """Return the model as messages name it."""
    return config.model if isinstance(config.model, str) else "model.from_config"


def device() -> str:
    """Return where this process trains."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def uses_bf16(config: RunConfig) -> bool:
    """Return whether the model computes in bf16 with weights in fp32."""
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bf16" or (config.precision == "auto" and has_bf16)


def dtype_of(config: RunConfig) -> torch.dtype:
    """Return the dtype of the parameters."""
    return torch.bfloat16 if config.precision == "bf16-true" else torch.float32


def spec_of(config: RunConfig, dataset: AnyDataset | None) -> str | dict[str, dict[str, Any]]:
    """Return what is loaded; without a dataset, as far as the config says."""
    return config.model if isinstance(config.model, str) else _fresh(config.model, dataset)


def _fresh(model: FromConfig, dataset: AnyDataset | None) -> dict[str, dict[str, Any]]:
    """Fill in the dataset's vocabulary and token ids: a family's own defaults mean nothing to another tokenizer."""
    if dataset is None:
        return {"from_config": model.from_config}
    entry = dataset.tokenizer
    ids = {"bos_token_id": entry.bos_id, "eos_token_id": entry.eos_id, "pad_token_id": entry.pad_id}
    ids["vocab_size"] = entry.max_id + 1
    model_type = str(model.from_config.get("model_type"))
    known = vars(CONFIG_MAPPING[model_type]()) if model_type in CONFIG_MAPPING else {}
    return {"from_config": {key: value for key, value in ids.items() if key in known} | model.from_config}
