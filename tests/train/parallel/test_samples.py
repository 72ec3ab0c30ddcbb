"""Samples of a run on several ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from train.parallel.ranks import on_ranks
from train.tiny_dataset import write_dataset

from llmt_train.config import RunConfig
from llmt_train.fit import build_module
from llmt_train.setup import set_up
from llmt_train.watch import samples

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "initializer_range": 0.2}  # fmt: skip


def written_with_other_rounding(config: dict[str, Any]) -> list[list[int]]:
    """The second rank's logits are as if of another device: its likeliest token ends a text at once."""
    setup = set_up(RunConfig.model_validate(config))
    sampler = samples.prepare_sampler(setup)
    assert sampler is not None
    choose = samples.choose

    def choose_here(logits_PV: torch.Tensor, *rest: Any) -> list[int]:
        ends = [min(sampler.stops)] * len(logits_PV)
        return ends if dist.get_rank() else choose(logits_PV, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "choose", choose_here)
        return [line["tokens"] for line in samples.write_samples(sampler, setup, build_module(setup), 5)]


def test_all_ranks_go_on_with_the_first_ones_tokens(tmp_path: Path) -> None:
    config = {
        "task": "pretrain", "model": {"from_config": LLAMA}, "data": str(write_dataset(tmp_path / "data")),
        "output": str(tmp_path / "run"), "batch": {"tokens": 80}, "train": {"steps": 2}, "optim": {"lr": 1e-2},
        "sample": {"every": 1, "prompts": ["w1 w2", "w7"], "max_tokens": 5},
    }  # fmt: skip
    first, second = on_ranks(2, written_with_other_rounding, config)
    assert first == second
    assert max(map(len, first)) > 1
