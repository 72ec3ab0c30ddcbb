"""Optimizers that look at whole matrices step sharded parameters as they step whole ones."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from train.parallel.ranks import on_ranks

from llmt_train.config import AdafactorConfig, MuonConfig
from llmt_train.optim import build_optimizer
from llmt_train.parallel.layout import Layout
from llmt_train.parallel.mesh import build_mesh

CONFIGS = {"muon": MuonConfig(optimizer="muon", lr=0.1), "adafactor": AdafactorConfig(optimizer="adafactor", lr=0.1)}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(31, 50), nn.ReLU(), nn.Linear(50, 33))


def _steps(model: nn.Module, name: str) -> list[Tensor]:
    optimizer = build_optimizer(model, CONFIGS[name])
    for seed in range(3):
        torch.manual_seed(seed)
        model(torch.randn(8, 31)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


def _differences(name: str) -> list[float]:
    alone, sharded = _model(), _model()
    mesh = build_mesh(Layout(shard=2), "cpu")
    fully_shard(sharded, mesh=mesh.fsdp)
    wanted, found = _steps(alone, name), [p.full_tensor() for p in _steps(sharded, name)]
    return [(a - b).abs().max().item() for a, b in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_sharded_steps_are_the_same_bits(name: str):
    assert on_ranks(2, _differences, name) == [[0.0] * 4] * 2
