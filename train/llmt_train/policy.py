"""The model that trains and the reference beside it: loaded, changed, laid out over devices, proven."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from llmt_shared.progress import say
from llmt_train.config import FromConfig, ParallelConfig, RunConfig
from llmt_train.data.batch import PackedBatch
from llmt_train.data.rows import AnyDataset
from llmt_train.model.adapt import add_rows, choose_trained, resize_embeddings
from llmt_train.model.adapters import without_adapters
from llmt_train.model.fill import Where, fill, materialise
from llmt_train.model.fused import parts_of, split_fused
from llmt_train.model.head import HeadSpec, find_head
from llmt_train.model.isolation import check_isolation
from llmt_train.model.liger import use_liger
from llmt_train.model.load import load_model, load_skeleton
from llmt_train.parallel.context import TokenSplit
from llmt_train.parallel.mesh import Mesh
from llmt_train.parallel.sharding import shard
from llmt_train.parallel.tensor import tensor_parallel
from llmt_train.reference import fingerprint, live_reference

Logps = Callable[[PackedBatch], Tensor]
"""A reference: from a micro-batch to the log-probabilities of its pairs, [Q, 2]."""


class Opened(NamedTuple):
    """A model that could train."""

    model: Any
    base: str | None
    """Fingerprint of the weights that it begins with, where they are not all in its checkpoints."""
    head: HeadSpec | None
    """How it makes its logits, where that is known."""


def open_policy(config: RunConfig, dataset: AnyDataset, mesh: Mesh) -> Opened:
    """Build the model that trains, lay it out over devices, fill it and prove it; all ranks call it.

    No rank ever holds the whole model, but with adapters, whose package wants to see it.
    """
    if config.lora is not None:
        model = _whole_model(config, dataset)
        base = fingerprint(model)
        choose_trained(model, config.train, config.lora, device())
        return Opened(model, base, lay_out(model.to(device()), config, mesh))
    model = _filled(config, dataset, mesh, partial(choose_trained, train=config.train, lora=None, device=device()))
    weights = fingerprint(model, where_on_disk(model)) if needs_first_weights(config) else None
    return Opened(model, weights, prove(model, config, mesh))


def open_reference(config: RunConfig, dataset: AnyDataset, mesh: Mesh) -> tuple[Logps, Callable[[], str]]:
    """Build the model that a run begins with as one that never changes; return it and what fingerprints its weights."""
    model = _filled(config, dataset, mesh, partial(_keep, config=config))
    head = prove(model, config, mesh)
    logps = live_reference(model, head, attention=config.attention, deterministic=config.train.deterministic)
    return logps, partial(fingerprint, model, where_on_disk(model))


def _keep(model: Any, config: RunConfig) -> None:
    model.requires_grad_(False).eval()
    if config.train.liger:
        use_liger(model, device=device())


def _filled(config: RunConfig, dataset: AnyDataset, mesh: Mesh, change: Callable[[Any], None]) -> Any:
    """The run's model with the weights that it begins with; ``change`` sees it before it is laid out."""
    spec, num_rows = spec_of(config, dataset), None
    model = load_skeleton(spec, dtype=dtype_of(config))
    if config.train.resize_embeddings:
        num_rows = add_rows(model, dataset.tokenizer.max_id + 1)
    split_fused(model)
    change(model)
    _spread(model, config, mesh)
    materialise(model, "cpu" if config.parallel.offload else device())
    fill(model, spec, seed=config.train.seed, where=where_on_disk(model), num_rows=num_rows)
    for module in model.modules():  # with offload the parameters alone stay in the host's memory
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device())
    return model


def _whole_model(config: RunConfig, dataset: AnyDataset) -> Any:
    model = load_model(spec_of(config, dataset), dtype=dtype_of(config), seed=config.train.seed)
    if config.train.resize_embeddings:
        resize_embeddings(model, dataset.tokenizer.max_id + 1)
    return model


def where_on_disk(model: Any) -> Where:
    """Return what says of a parameter's name which rows of which tensor it is on disk: of a split model, and any."""

    def where(name: str) -> tuple[str, slice | None]:
        rows = parts_of(model.config, name)
        return (name, None) if rows is None else (rows.name, slice(rows.first, rows.last))

    return where


def lay_out(model: Any, config: RunConfig, mesh: Mesh) -> HeadSpec | None:
    """Lay a model with its weights out over devices and prove it, see `prove`."""
    _spread(model, config, mesh)
    return prove(model, config, mesh)


def _spread(model: Any, config: RunConfig, mesh: Mesh) -> None:
    tensor_parallel(model, mesh, sp=config.parallel.sp)
    shard(model, mesh, compute=_compute(config), offload=config.parallel.offload)


def prove(model: Any, config: RunConfig, mesh: Mesh) -> HeadSpec | None:
    """Prove that packed documents are isolated in a model, and find how it makes its logits; all ranks call it."""
    split, place = split_of(config, mesh), torch.device(device())
    check_isolation(model, attention=config.attention, compute=_compute(config), split=split, device=place)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head = find_head(model, split)
    for warning in caught:
        say(f"note: {warning.message}")
    return head


def split_of(config: RunConfig, mesh: Mesh) -> TokenSplit:
    """Return which ranks share the tokens of a micro-batch."""
    return TokenSplit(mesh.tp, mesh.cp, config.parallel.sp and mesh.layout.tp > 1)


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


def on_one_device(config: RunConfig) -> RunConfig:
    """Return a run's config for a command that uses one device, whatever the run trains on."""
    return config.model_copy(update={"parallel": ParallelConfig(dp=1)})


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


def _compute(config: RunConfig) -> torch.dtype | None:
    """Of the arithmetic, where it is not the parameters'."""
    return torch.bfloat16 if uses_bf16(config) else None


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
