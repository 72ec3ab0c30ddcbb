"""Schedules against published formulas, weight decay where it belongs."""

import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from llmt_train.config import OptimConfig
from llmt_train.optim import build_optimizer, build_scheduler, lr_factor, parameter_groups

TOTAL, WARMUP = 50, 5


def ours(schedule: str, floor: float = 0.0, decay: int = 10) -> list[float]:
    return [
        lr_factor(step, total=TOTAL, schedule=schedule, warmup=WARMUP, decay=decay, floor=floor)
        for step in range(TOTAL)
    ]


def theirs(build) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build(optimizer, WARMUP, TOTAL)
    factors = []
    for _ in range(TOTAL):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(
    ("schedule", "build"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_after_the_warmup_the_schedule_is_that_of_transformers(schedule: str, build) -> None:
    assert ours(schedule)[WARMUP:] == pytest.approx(theirs(build)[WARMUP:], rel=0, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_the_warmup_rises_by_equal_parts_and_never_gives_zero(schedule: str) -> None:
    assert ours(schedule)[:WARMUP] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_constant_stays() -> None:
    assert set(ours("constant", floor=0.5)[WARMUP:]) == {1.0}


def test_wsd_stays_then_falls_linearly_over_the_last_steps() -> None:
    factors = ours("wsd")
    assert factors[WARMUP : TOTAL - 10] == [1.0] * (TOTAL - 10 - WARMUP)
    assert factors[TOTAL - 10 :] == pytest.approx([1 - k / 10 for k in range(10)])


def test_cosine_with_a_floor_is_the_formula_of_sgdr() -> None:
    floor = 0.1
    expected = [floor + (1 - floor) / 2 * (1 + math.cos(math.pi * t / (TOTAL - WARMUP))) for t in range(TOTAL - WARMUP)]
    assert ours("cosine", floor)[WARMUP:] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_floor_is_reached_at_the_end_of_the_run_and_kept(schedule: str) -> None:
    for step in (TOTAL, TOTAL + 10):
        factor = lr_factor(step, total=TOTAL, schedule=schedule, warmup=WARMUP, decay=10, floor=0.25)
        assert factor == pytest.approx(0.25)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_a_warmup_as_long_as_the_run_never_divides_by_zero(schedule: str) -> None:
    assert lr_factor(0, total=1, schedule=schedule, warmup=1, decay=1, floor=0.0) == 1.0
    assert lr_factor(1, total=1, schedule=schedule, warmup=1, decay=1, floor=0.0) >= 0.0


def test_the_scheduler_sets_the_factor_times_lr() -> None:
    config = OptimConfig(lr=0.5, schedule="wsd", warmup="10%", decay="20%", min_lr=0.05)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    scheduler = build_scheduler(optimizer, config, TOTAL)
    for step in range(TOTAL):
        expected = lr_factor(step, total=TOTAL, schedule="wsd", warmup=5, decay=10, floor=0.1) * 0.5
        assert {group["lr"] for group in optimizer.param_groups} == {expected}
        optimizer.step()
        scheduler.step()


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
    config = OptimConfig(lr=0.1, weight_decay=0.5, eps=1e-8)
    layer = nn.Linear(2, 1, bias=False)
    before, gradient = layer.weight.detach().clone(), torch.tensor([[0.3, -2.0]])
    layer.weight.grad = gradient.clone()
    build_optimizer(layer, config).step()
    expected = before - 0.1 * (gradient / (gradient.abs() + 1e-8) + 0.5 * before)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=1e-7)
