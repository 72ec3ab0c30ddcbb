"""One process per device: what a user is told when one of them comes to grief, and how all are stopped."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmt_shared.errors import ConfigError
from llmt_train.config import ParallelConfig
from llmt_train.parallel.failures import RankError
from llmt_train.parallel.launch import launch, local_processes, this_command

TOY = str(Path(__file__).with_name("toy_run.py"))
HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(how: str, timeout: int = 30) -> None:
    launch([sys.executable, TOY, how, str(timeout)], 2, timeout=timeout, grace=3)


def test_rank_0_alone_speaks(capfd: pytest.CaptureFixture[str]):
    run("well")
    out, err = capfd.readouterr()
    assert out == "the result\n"
    assert err.count("begin with 2") == 1
    assert err.count("UserWarning: alike") == 1


def test_a_killed_rank_ends_the_run_at_once_and_is_named():
    with pytest.raises(RankError, match=re.escape(f"rank 1 ({HOST}) was killed by SIGKILL after step 3")) as caught:
        run("kill")
    assert "rank 0" not in str(caught.value)
    assert "resumes from the newest checkpoint" in str(caught.value)


def test_a_rank_that_hangs_ends_the_run_within_the_time_out_and_is_named():
    with pytest.raises(RankError, match=re.escape(f"rank 1 ({HOST}) is behind after step 3")) as caught:
        run("sleep", timeout=2)
    assert "toy_run.py" in str(caught.value)
    assert "come_to_grief" in str(caught.value)
    assert "rank 0" not in str(caught.value)


def test_a_bug_of_one_rank_is_shown_with_its_rank_and_lines():
    with pytest.raises(RankError, match=re.escape(f"rank 1 ({HOST}): ArithmeticError: a bug of one")) as caught:
        run("raise")
    assert "in come_to_grief" in str(caught.value)
    assert "closed by peer" not in str(caught.value)


def test_a_rank_that_left_without_a_word_is_shown_with_its_last_lines():
    with pytest.raises(RankError, match=r"rank 1 .*: ended with exit code 7; its last lines:\nwhat it wrote"):
        run("leave")


def test_a_mistake_of_all_is_told_once(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match=r"^a mistake of all$"):
        run("config")
    assert "mistake" not in capfd.readouterr().err


@contextlib.contextmanager
def toy(*command: str) -> "contextlib.AbstractContextManager[subprocess.Popen[str]]":
    process = subprocess.Popen(
        [sys.executable, TOY, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_step(process: subprocess.Popen[str], step: int) -> int:
    """Read what is said until a step; return the process id of rank 0."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.rstrip().endswith(f"step {step}"):
            return int(line.split()[1])
    raise AssertionError("it ended early")


def test_sigterm_stops_all_ranks_after_one_step():
    with toy("stop", "30") as process:
        wait_for_step(process, 3)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (4, "")
    assert len(re.findall(r"^stopped: saved at step \d+$", err, re.MULTILINE)) == 1
    assert err.count("SIGTERM: finishing this step") == 1


def test_a_launcher_that_is_killed_takes_its_workers_along():
    with toy("stop", "30") as process:
        worker = wait_for_step(process, 3)
        process.kill()
        end = time.monotonic() + 20
        while is_running(worker) and time.monotonic() < end:
            time.sleep(0.05)
        assert not is_running(worker)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(
    ("config", "num_gpus", "number"),
    [
        (ParallelConfig(), 0, 1),
        (ParallelConfig(tp=2), 0, 2),
        (ParallelConfig(dp=2, cp=2), 0, 4),
        (ParallelConfig(), 1, 1),
        (ParallelConfig(), 8, 8),
        (ParallelConfig(tp=4), 8, 8),
        (ParallelConfig(dp=8), 8, 8),
    ],
)
def test_as_many_processes_as_gpus_or_as_are_said(config: ParallelConfig, num_gpus: int, number: int):
    assert local_processes(config, num_gpus) == number


@pytest.mark.parametrize(
    ("config", "num_gpus", "wanted"),
    [
        (ParallelConfig(tp=3), 8, "wanted a multiple of 3"),
        (ParallelConfig(dp=4, tp=4), 8, "wanted 16 processes, or `dp: auto`"),
        (ParallelConfig(dp=2), 8, "has 8 GPUs; wanted `dp: auto`, or CUDA_VISIBLE_DEVICES=0,1 in the environment"),
    ],
)
def test_gpus_that_would_be_idle_or_are_missing_are_refused(config: ParallelConfig, num_gpus: int, wanted: str):
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        local_processes(config, num_gpus)


def test_workers_run_the_same_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["llmt-train", "fit", "--config", "run.yaml", "parallel.tp=2"])
    assert this_command()[-6:] == ["-m", "llmt_train", "fit", "--config", "run.yaml", "parallel.tp=2"]
