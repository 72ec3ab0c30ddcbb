"""Schedules against published formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from llmt_shared.errors import ConfigError
from llmt_train.config import AdamwConfig
from llmt_train.optim import build_optimizer
from llmt_train.schedule import build_scheduler, check_schedule, falling_steps, lr_factor, resolve

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


@pytest.mark.parametrize("decay", [0, "0%"])
def test_wsd_without_a_decay_never_falls(decay) -> None:
    config = AdamwConfig(lr=1, schedule="wsd", decay=decay)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = build_scheduler(optimizer, config, TOTAL).lr_lambdas[0]
    assert {factor(step) for step in range(TOTAL)} == {1.0}
    assert falling_steps(config, TOTAL, 1) == 0


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
    config = AdamwConfig(lr=0.5, schedule="wsd", warmup="10%", decay="20%", min_lr=0.05)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    scheduler = build_scheduler(optimizer, config, TOTAL)
    for step in range(TOTAL):
        expected = lr_factor(step, total=TOTAL, schedule="wsd", warmup=5, decay=10, floor=0.1) * 0.5
        assert {group["lr"] for group in optimizer.param_groups} == {expected}
        optimizer.step()
        scheduler.step()


@settings(derandomize=True, max_examples=300)
@given(
    total=st.integers(1, 400),
    schedule=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    floor=st.floats(0, 1),
)
def test_a_rate_rises_once_then_never_again_and_stays_within_its_bounds(total, schedule, shares, floor) -> None:
    warmup, decay = (int(share * total) for share in shares)
    factors = [
        lr_factor(step, total=total, schedule=schedule, warmup=warmup, decay=decay, floor=floor)
        for step in range(total)
    ]
    assert all(0 < factor <= 1 for factor in factors[: warmup or 1])
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[max(0, warmup - 1) :] == sorted(factors[max(0, warmup - 1) :], reverse=True)
    assert all(factor >= floor - 1e-12 for factor in factors[warmup:])


@pytest.mark.parametrize(
    ("duration", "steps"),
    [(7, 7), ("3%", 6), ("0.2 %", 0), ("100%", 200), ("10M tokens", 10), ("10000001 tokens", 11), ("2.5M tokens", 3)],
)
def test_a_duration_is_steps_a_share_or_tokens(duration, steps) -> None:
    assert resolve(duration, 200, 1_000_000) == steps


@pytest.mark.parametrize("warmup", [101, "101M tokens"])
def test_a_warmup_longer_than_the_run_is_refused(warmup) -> None:
    with pytest.raises(ConfigError, match=r"optim\.warmup: .* is 101 steps, but the run has 100"):
        check_schedule(AdamwConfig(lr=1, warmup=warmup), 100, 1_000_000)


def test_a_warmup_and_a_decay_that_overlap_are_refused() -> None:
    check_schedule(AdamwConfig(lr=1, schedule="wsd", warmup="80%", decay="20%"), 100, 1)
    with pytest.raises(ConfigError, match="81 and 20 steps do not fit into the run's 100"):
        check_schedule(AdamwConfig(lr=1, schedule="wsd", warmup=81, decay="20%"), 100, 1)
