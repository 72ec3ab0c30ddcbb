"""How many processes a run has, and what of rows, model and config can be shared out over them."""

from contextlib import nullcontext

import pytest
import torch
from train.tiny_models import CONFIGS

from llmt_shared.errors import ConfigError
from llmt_train.check.topology import (
    check_rows,
    launched_processes,
    layout_checks,
    named,
    num_processes,
    processes_of_machine,
)
from llmt_train.config import ParallelConfig, RunConfig
from llmt_train.model.load import load_skeleton
from llmt_train.parallel.layout import Layout


@pytest.fixture(autouse=True)
def _nobody_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("config", "gpus", "wanted"),
    [
        ({}, 0, 1),
        ({}, 8, 8),
        ({"tp": 2}, 8, 8),
        ({"tp": 2, "cp": 2}, 0, 4),
        ({"dp": 4, "tp": 2}, 0, 8),
        ({"dp": 4, "tp": 2}, 2, 8),
    ],
)
def test_here_it_is_what_is_said_or_what_is_there(monkeypatch, config, gpus, wanted):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert num_processes(ParallelConfig(**config)) == wanted


def test_elsewhere_it_is_what_is_said_or_the_fewest():
    assert num_processes(ParallelConfig(tp=2, cp=2, replicate=2), on="H100") == 8
    assert num_processes(ParallelConfig(dp=3), on="H100") == 3
    assert num_processes(ParallelConfig(dp=3), on="H100", devices=16) == 16


LAUNCHED = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


def test_a_launcher_has_the_last_word(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert num_processes(ParallelConfig(dp=2)) == 2  # a number alone is no launcher
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert num_processes(ParallelConfig(dp=2)) == 6
    assert num_processes(ParallelConfig(dp=2), on="H100") == 2


def test_processes_are_of_this_machine_where_nobody_says_otherwise():
    assert processes_of_machine(8, {}) == 8
    assert processes_of_machine(8, LAUNCHED | {"LOCAL_WORLD_SIZE": "4"}) == 4
    assert processes_of_machine(8, LAUNCHED) == 8
    assert launched_processes({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # a batch script, no task of it


@pytest.mark.parametrize(
    ("config", "length"), [({"cp": 4}, 16), ({"tp": 3, "sp": False}, 16), ({"cp": 2, "tp": 4}, 16)]
)
def test_rows_that_divide_are_shared(config, length):
    check_rows(ParallelConfig(**config), length)


def test_rows_that_do_not_divide_are_refused_with_ways_out():
    with pytest.raises(ConfigError) as caught:
        check_rows(ParallelConfig(cp=2, tp=8), 40)
    assert str(caught.value) == (
        "parallel: cp 2 x tp 8 (sp) = 16 ranks share the tokens of a row, but its length 40 does not divide by 16; "
        "legal for such rows: 1, 2, 4, 5, 8, 10, 20, 40; or `sp: false`; or pack rows of 32 tokens"
    )


@pytest.mark.parametrize(
    ("family", "calls", "is_refused"),
    [("llama", 2, False), ("llama", None, False), ("llama", 1, True), ("mamba2", 0, True)],
)
def test_cp_wants_attention_in_every_layer(family, calls, is_refused):
    """A layer of another kind would see this rank's tokens alone."""
    skeleton = load_skeleton({"from_config": {"model_type": family, **CONFIGS[family]}})
    run = {
        "task": "pretrain", "model": "x", "data": "data", "output": "run", "batch": {"tokens": 16},
        "train": {"steps": 1}, "optim": {"lr": 1e-3}, "parallel": {"cp": 2},
    }  # fmt: skip
    [asked] = layout_checks(skeleton, RunConfig.model_validate(run), None if calls is None else [None] * calls)
    with pytest.raises(ConfigError, match="not every layer") if is_refused else nullcontext():
        asked()


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (Layout(), "1: dp 1"),
        (Layout(shard=2, tp=2), "4: dp 2 x tp 2 (sp)"),
        (Layout(replicate=2, shard=4), "8: dp 8 (2 copies)"),
        (Layout(cp=4), "4: cp 4"),
    ],
)
def test_a_layout_is_read_at_a_glance(layout, text):
    assert named(layout, sp=True) == text
