"""Processes meet and part: alone, as srun starts them, in a group that is there."""

import os
import subprocess
import sys

import pytest
import torch.distributed as dist
from train.parallel.ranks import on_ranks
from train.parallel.test_launch import HOST, TOY

from llmt_shared.progress import is_silent
from llmt_train.config import ParallelConfig
from llmt_train.parallel.environment import JoinedGroup
from llmt_train.parallel.process import Process, joined


def test_a_process_alone_is_a_group_of_one_that_ends_with_it():
    for _ in range(2):
        with joined(ParallelConfig()) as process:
            process.beat(1)
            assert (process.rank, process.world, process.local_rank, process.local_world) == (0, 1, 0, 1)
            assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
            assert not is_silent()
        assert not dist.is_initialized()


def test_an_error_leaves_no_group_and_is_not_changed():
    with pytest.raises(ZeroDivisionError), joined(ParallelConfig()):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def _joined_twice() -> tuple[Process, int]:
    with joined(ParallelConfig()) as process, joined(ParallelConfig()) as again:
        assert process == again
    environment = JoinedGroup()
    return process, environment.world_size() + 10 * environment.global_rank()


def test_a_group_that_is_there_is_used_and_stays():
    found = on_ranks(2, _joined_twice)
    assert [(process.rank, process.world) for process, _ in found] == [(0, 2), (1, 2)]
    assert [number for _, number in found] == [2, 12]


def as_srun_does(how: str, *, timeout: int = 30, who: int = 1, absent: int = 0) -> list[tuple[int, str, str]]:
    """Start two tasks as `srun --ntasks=2` does on one machine; return exit code, stdout and stderr of each."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NODELIST": "localhost",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, TOY, how, str(timeout), str(who)],
            env=environment | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2 - absent)
    ]
    said = [task.communicate(timeout=60) for task in tasks]
    return [(task.returncode, out, err) for task, (out, err) in zip(tasks, said, strict=True)]


def test_tasks_of_srun_train_together():
    (code, out, err), (other_code, other_out, other_err) = as_srun_does("well")
    assert (code, out, other_code, other_out) == (0, "the result\n", 0, "")
    assert "begin with 2" in err
    assert other_err == ""


def test_the_survivor_names_the_rank_that_was_killed():
    (code, _, err), (killed, _, _) = as_srun_does("kill")
    assert (code, killed) == (1, -9)
    assert f"error: rank 1 ({HOST}) gives no sign of life after step 3" in err
    assert "Traceback" not in err


def test_the_survivor_names_rank_0_whose_store_is_gone():
    (killed, _, _), (code, _, err) = as_srun_does("kill", who=0)
    assert (code, killed) == (1, -9)
    assert f"error: rank 0 ({HOST}) gives no sign of life" in err
    assert "rank 1" not in err


def test_a_mistake_of_all_tasks_is_told_by_the_first():
    (code, _, err), (other_code, _, other_err) = as_srun_does("config")
    assert (code, other_code) == (2, 2)
    assert err.endswith("error: a mistake of all\n")
    assert other_err == ""


def test_a_bug_of_one_task_is_told_once():
    (code, _, err), (other_code, _, other_err) = as_srun_does("raise")
    assert (code, other_code) == (1, 1)
    assert (err + other_err).count("error: ") == 1
    assert f"error: rank 1 ({HOST}): ArithmeticError: a bug of one" in err + other_err


def test_a_rank_that_does_not_come_is_named():
    [(code, _, err)] = as_srun_does("well", timeout=3, absent=1)
    assert code == 1
    assert "rank 1 of 2 did not come within 3 s (parallel.timeout)" in err
