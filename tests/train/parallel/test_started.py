"""What the environment says of how a process was started."""

import pytest

from llmt_shared.errors import ConfigError
from llmt_train.parallel.started import first_host, how_started, told_once_a_machine

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODELIST": "node[01-03,07]",
}


def test_a_user_starts_one_process():
    assert how_started({}) is None


def test_torchrun_says_all():
    started = how_started(TORCHRUN)
    assert started is not None
    assert started[:6] == (5, 8, 1, 4, "head", 29500)
    assert (started.has_store, started.attempt) == (True, "2")


def test_torchrun_without_the_rest_is_refused():
    with pytest.raises(ConfigError, match="RANK is set, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not"):
        how_started({"RANK": "0"})


def test_a_rank_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'all'; wanted a number"):
        how_started(TORCHRUN | {"WORLD_SIZE": "all"})


def test_tasks_of_srun_meet_at_the_first_node():
    started = how_started(SRUN)
    assert started is not None
    assert started[:5] == (5, 8, 1, None, "node01")
    assert not started.has_store


def test_tasks_of_one_job_come_to_one_port_and_jobs_to_different_ones():
    ports = {how_started(SRUN | {"SLURM_PROCID": str(rank)}).port for rank in range(8)}
    other = how_started(SRUN | {"SLURM_JOB_ID": "123457"}).port
    assert len(ports) == 1
    assert other not in ports
    assert all(1024 < port < 32768 for port in (*ports, other))


def test_torchrun_inside_srun_is_torchrun():
    assert how_started(SRUN | TORCHRUN) == how_started(TORCHRUN)


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_STEP_ID"])
def test_an_allocation_without_srun_is_one_process(missing: str):
    """A batch script, and a shell of salloc, have some of the variables."""
    assert how_started({name: value for name, value in SRUN.items() if name != missing}) is None


def test_one_task_of_srun_is_one_process():
    assert how_started(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("node[01-03,07]", "node01"),
        ("node[7]", "node7"),
        ("node[07,11-12],other3", "node07"),
        ("a3,node[1-2]", "a3"),
        ("rack[1-2]node[003-004]-ib", "rack1node003-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("local_rank", "is_told"), [("0", False), ("1", True)])
def test_an_early_mistake_is_told_once_a_machine(local_rank: str, is_told: bool, monkeypatch: pytest.MonkeyPatch):
    for name, value in (TORCHRUN | {"LOCAL_RANK": local_rank}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^rank 5 \(.*\): wrong$") as caught, told_once_a_machine():
        raise ConfigError("wrong")
    assert caught.value.is_told == is_told
