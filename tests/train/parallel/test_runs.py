"""Runs by the command line on several processes, one of which is killed; they go on with any others."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from train.tiny_dataset import write_dataset

from llmt_train.watch.metrics import read_metrics

_STEPS = 48
_MODEL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    data = write_dataset(tmp_path / "data", num_rows=30)
    path.write_text(json.dumps({
        "task": "pretrain", "model": {"from_config": _MODEL}, "data": str(data), "output": str(tmp_path / "run"),
        "batch": {"tokens": 96}, "train": {"steps": _STEPS}, "optim": {"lr": 1e-3}, "save": {"every": 3},
        "eval": {"every": 12},
    }))  # fmt: skip
    return path


def command(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "llmt_train", "fit", "--config", str(config), *overrides]


def finish(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(config, *overrides), capture_output=True, text=True, check=False, env=environment, timeout=300
    )


def kill_one(config: Path, rank: int, *overrides: str) -> tuple[int, str]:
    """Kill a rank once there is a checkpoint; return the exit code of the whole and what it wrote."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command(config, *overrides), stderr=subprocess.PIPE, text=True, env=environment)
    output = config.parent / "run"
    while run.poll() is None and not any(record["step"] >= 5 for record in read_metrics(output)):
        time.sleep(0.01)
    os.kill(_pid_of(run.pid, rank), signal.SIGKILL)
    _, text = run.communicate(timeout=120)
    return run.returncode, text


def _pid_of(launcher: int, rank: int) -> int:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {
        int(pid): dict(
            part.split("=", 1) for part in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in part
        )
        for pid in children
    }
    return next(pid for pid, environment in ranks.items() if environment.get("RANK") == str(rank))


def curve(output: Path) -> list[dict[str, Any]]:
    names = ("step", "loss", "grad_norm", "lr", "tokens", "rows", "fill")
    return [{name: record[name] for name in names} for record in read_metrics(output) if "loss" in record]


def assert_same_curve(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len(found) == len(wanted) == _STEPS
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="the ranks' processes are found through /proc")
def test_a_killed_rank_is_named_and_the_run_goes_on_elsewhere(config: Path) -> None:
    code, text = kill_one(config, 1, "parallel.dp=2")
    assert code == 1
    assert f"rank 1 ({socket.gethostname()}) was killed by SIGKILL after step" in text
    assert "Traceback" not in text
    resumed = finish(config, "parallel.tp=2")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming  after step" in resumed.stderr
    assert resumed.stdout.count("\n") == 1
    assert "redistributing" not in resumed.stderr  # a remark of torch's, on norms over two axes
    alone = finish(config, f"output={config.parent / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    assert_same_curve(curve(config.parent / "run"), curve(config.parent / "alone"))


@pytest.mark.slow
def test_what_four_ranks_left_goes_on_with_any_number(config: Path) -> None:
    code, text = kill_one(config, 2, "parallel.dp=2", "parallel.tp=2")
    assert (code, "rank 2 " in text) == (1, True), text
    assert finish(config, f"output={config.parent / 'whole'}", "parallel.dp=2", "parallel.tp=2").returncode == 0
    wanted = curve(config.parent / "whole")
    for name, parallel in {"dp4": ["parallel.dp=4"], "tp2": ["parallel.tp=2"], "one": []}.items():
        shutil.copytree(config.parent / "run", config.parent / name)
        resumed = finish(config, f"output={config.parent / name}", *parallel)
        assert resumed.returncode == 0, resumed.stderr
        assert "resuming  after step" in resumed.stderr
        assert_same_curve(curve(config.parent / name), wanted)
