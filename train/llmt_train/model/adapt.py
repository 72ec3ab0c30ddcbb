"""What is changed of a model before it trains, in the order in which it must happen."""

from typing import Any

import torch

from llmt_train.config import LoraConfig, RunConfig, TrainConfig
from llmt_train.model.adapters import add_adapters
from llmt_train.model.compilation import compile_layers
from llmt_train.model.freezing import freeze
from llmt_train.model.liger import use_liger
from llmt_train.model.recompute import recompute


def resize_embeddings(model: Any, num_rows: int) -> None:
    """Give a model more embedding rows, and logits: each the mean of those that it has (Hewitt 2021).

    The mean is rounded to bf16, so that it is the same bits on every machine: checkpoints of adapters do not hold it.

    Args:
        model: of transformers; its config follows.
        num_rows: wanted at least; a model that has as many stays as it is.
    """
    before = model.get_input_embeddings().weight.shape[0]
    if before >= num_rows:
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.resize_token_embeddings(num_rows, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for parameter in layer.parameters():
                parameter[before:] = parameter[:before].double().mean(0).bfloat16()


def choose_trained(model: Any, train: TrainConfig, lora: LoraConfig | None) -> None:
    """Decide what trains: adapters, or the model without what is frozen; before that, exchange kernels.

    Raises:
        ConfigError: naming the key that cannot be served.
    """
    if train.liger:
        use_liger(model)  # while its layers are still its own
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
