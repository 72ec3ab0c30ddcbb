"""Every optimizer against its paper, in fp64; which parameters it steps, and which decay."""

import math
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from train.interrupted import curve
from train.tiny_dataset import write_dataset
from train.tiny_models import FAMILIES, tiny
from transformers import GPT2Config, GPT2LMHeadModel

from llmt_train.config import AdafactorConfig, AdamwConfig, MuonConfig, OptimConfig, RunConfig, SgdConfig
from llmt_train.fit import fit
from llmt_train.optim import build_optimizer, parameter_groups
from llmt_train.schedule import build_scheduler


def test_only_matrices_outside_embeddings_decay() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = parameter_groups(model, 0.1)
    assert sorted(names[id(parameter)] for parameter in decayed["params"]) == [
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    ]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(kept["params"]) == len(names)  # the tied head is counted once, as an embedding


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 2


def test_one_step_equals_adamw_of_the_paper() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, first step: m_hat = g, v_hat = g^2."""
    config = AdamwConfig(lr=0.1, weight_decay=0.5, eps=1e-8)
    layer = nn.Linear(2, 1, bias=False)
    before, gradient = layer.weight.detach().clone(), torch.tensor([[0.3, -2.0]])
    layer.weight.grad = gradient.clone()
    build_optimizer(layer, config).step()
    expected = before - 0.1 * (gradient / (gradient.abs() + 1e-8) + 0.5 * before)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=1e-7)


def steps_of(config, shape=(6, 4), steps=4):
    """A matrix before and after some steps with given gradients, in fp64, and the gradients."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape, generator=generator))
    optimizer, weights = build_optimizer(layer, config), [layer.weight.detach().clone()]
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        optimizer.step()
        weights.append(layer.weight.detach().clone())
    return weights, gradients


def test_adamw_is_algorithm_2_of_its_paper() -> None:
    weights, gradients = steps_of(AdamwConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5))
    wanted, m, v = weights[0], 0, 0
    for t, g in enumerate(gradients, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        wanted = wanted - 0.01 * ((m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3) + 0.5 * wanted)
        torch.testing.assert_close(weights[t], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_momentum_with_coupled_decay(nesterov) -> None:
    weights, gradients = steps_of(SgdConfig(optimizer="sgd", lr=0.1, momentum=0.7, nesterov=nesterov, weight_decay=0.3))
    wanted, buffer = weights[0], 0
    for t, gradient in enumerate(gradients, start=1):
        g = gradient + 0.3 * wanted
        buffer = 0.7 * buffer + g
        wanted = wanted - 0.1 * (g + 0.7 * buffer if nesterov else buffer)
        torch.testing.assert_close(weights[t], wanted, rtol=1e-12, atol=1e-12)


def test_adafactor_is_algorithm_4_of_its_paper() -> None:
    weights, gradients = steps_of(AdafactorConfig(optimizer="adafactor", lr=0.02, weight_decay=0.0))
    wanted, rows, columns = weights[0], 0, 0
    for t, g in enumerate(gradients, start=1):
        beta = 1 - t**-0.8
        rows = beta * rows + (1 - beta) * (g**2).mean(1, keepdim=True)
        columns = beta * columns + (1 - beta) * (g**2).mean(0, keepdim=True)
        update = g / (rows @ columns / rows.mean()).sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        size = max(1e-3, wanted.square().mean().sqrt().item())
        wanted = wanted - min(0.02, 1 / math.sqrt(t)) * size * update
        torch.testing.assert_close(weights[t], wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_steps_by_the_orthogonal_factor_of_its_momentum(shape, nesterov) -> None:
    """Newton-Schulz in bf16 brings the singular values near 1, not to it: so near is the polar factor."""
    config = MuonConfig(optimizer="muon", lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.2)
    weights, gradients = steps_of(config, shape)
    buffer = 0
    for t, g in enumerate(gradients, start=1):
        buffer = 0.9 * buffer + 0.1 * g
        looked_at = 0.1 * g + 0.9 * buffer if nesterov else buffer
        u, _, v = torch.linalg.svd(looked_at, full_matrices=False)
        step = (weights[t - 1] * (1 - 0.1 * 0.2) - weights[t]) / (0.1 * 0.2 * math.sqrt(max(shape)))
        singular = torch.linalg.svdvals(step)
        assert singular.min() > 0.5
        assert singular.max() < 1.3
        cosine = (step * (u @ v)).sum() / step.norm() / (u @ v).norm()
        assert cosine > 0.97


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_takes_the_hidden_matrices_and_nothing_else(family) -> None:
    model = tiny(family)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, MuonConfig(optimizer="muon", lr=0.1))
    muon, adamw = optimizer.parts
    of_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    of_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert of_muon | of_adamw == set(names.values())
    assert not of_muon & of_adamw
    assert all(".layers." in name or ".h." in name for name in of_muon)
    assert all(not name.endswith(("norm.weight", "bias")) for name in of_muon)
    layers = {name for name in names.values() if (".layers." in name or ".h." in name) and "norm" not in name}
    assert {name for name in layers if name.endswith("weight") and "ln_" not in name} == of_muon


def test_a_model_without_hidden_matrices_is_all_adamws() -> None:
    optimizer = build_optimizer(nn.Embedding(4, 3), MuonConfig(optimizer="muon", lr=0.1))
    assert [type(part).__name__ for part in optimizer.parts] == ["AdamW"]


def test_the_learning_rate_reaches_both_parts_also_after_loading() -> None:
    model, config = tiny("llama"), MuonConfig(optimizer="muon", lr=0.5, schedule="linear")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer(model, config)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = build_scheduler(optimizer, config, 10)
    optimizer.step()
    scheduler.step()
    rates = [group["lr"] for part in optimizer.parts for group in part.param_groups]
    assert rates == pytest.approx([0.45] * 3)


OPTIMIZERS = {
    "adamw": {"lr": 1e-2},
    "muon": {"optimizer": "muon", "lr": 1e-2},
    "adafactor": {"optimizer": "adafactor", "lr": 1e-2},
    "sgd": {"optimizer": "sgd", "lr": 0.3, "nesterov": True},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    data = write_dataset(tmp_path / "data", validation_rows=0)
    model = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 4}  # fmt: skip

    def run(folder: str, steps: int) -> None:
        fit(RunConfig.model_validate({
            "task": "pretrain", "model": {"from_config": model}, "data": data, "output": tmp_path / folder,
            "batch": {"tokens": 80, "micro_rows": 2}, "train": {"steps": steps}, "save": {"every": 3},
            "optim": {"schedule": "constant", **OPTIMIZERS[name]},
        }))  # fmt: skip

    run("whole", 12)
    run("parts", 5)
    run("parts", 12)
    whole = curve(tmp_path / "whole")
    assert curve(tmp_path / "parts") == whole
    assert whole[-1]["loss"] < 0.97 * whole[0]["loss"]


def test_the_optimizer_is_adamw_where_none_is_named() -> None:
    adapter = TypeAdapter(OptimConfig)
    assert isinstance(adapter.validate_python({"lr": 1e-3}), AdamwConfig)
    assert isinstance(adapter.validate_python({"lr": 1e-3, "optimizer": "muon"}), MuonConfig)
