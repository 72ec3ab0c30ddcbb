"""What is changed of a model before it trains, in the order in which it must happen."""

from typing import Any

import torch

from llmt_train.config import LoraConfig, RunConfig, TrainConfig
from llmt_train.model.adapters import add_adapters
from llmt_train.model.compilation import compile_layers
from llmt_train.model.fill import fill_new_rows
from llmt_train.model.freezing import freeze
from llmt_train.model.liger import use_liger
from llmt_train.model.recompute import recompute


def resize_embeddings(model: Any, num_rows: int) -> None:
    """Give a model more embedding rows, and logits: each the mean of those that it has, see `fill_new_rows`.

    Args:
        model: of transformers, with its weights; its config follows.
        num_rows: wanted at least; a model that has as many stays as it is.
    """
    before = add_rows(model, num_rows)
    if before is not None:
        fill_new_rows(model, before)


def add_rows(model: Any, num_rows: int) -> int | None:
    """Give a model more embedding rows, and logits, without values.

    Args:
        model: of transformers, perhaps on the meta device, not sharded; its config follows.
        num_rows: wanted at least.

    Returns:
        How many it had, for `fill`; ``None`` where they are enough and it stays as it is.
    """
    before = int(model.get_input_embeddings().weight.shape[0])
    if before >= num_rows:
        return None
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    return before


def choose_trained(model: Any, train: TrainConfig, lora: LoraConfig | None, device: str) -> None:
    """Decide what trains: adapters, or the model without what is frozen; before that, exchange kernels.

    Args:
        model: of transformers, perhaps on the meta device.
        train: of the run's config.
        lora: likewise.
        device: where it will train.

    Raises:
        ConfigError: naming the key that cannot be served.
    """
    if train.liger:
        use_liger(model, device=device)  # while its layers are still its own
    if lora is not None:
        add_adapters(model, lora, seed=train.seed)
    freeze(model, train.freeze)


def choose_execution(model: Any, config: RunConfig) -> None:
    """Decide how layers run: compiled, and what of them is computed again.

    Raises:
        ConfigError: naming the key that cannot be served.
    """
    if config.train.compile:
        compile_layers(model)
    recompute(model, config.train.checkpointing)
