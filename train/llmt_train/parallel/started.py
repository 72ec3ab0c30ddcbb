"""How this process was started, as its environment tells: alone, or as one of several by us, torchrun or srun.

Loads nothing heavy: the command line asks before torch is there.
"""

import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from llmt_shared.errors import ConfigError, LlmtError

LAUNCHER = "LLMT_LAUNCHER"
"""Variable that holds the process id of `llmt-train fit` in the workers that it starts."""
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Started(NamedTuple):
    """One of the processes that run together."""

    rank: int
    world: int
    local_rank: int
    local_world: int | None
    """Processes on this machine; ``None`` where the environment does not say."""
    address: str
    port: int
    """Where the ranks' store listens."""
    has_store: bool
    """Whether whoever started the ranks keeps that store; else rank 0 does."""
    by_slurm: bool = False
    attempt: str = "0"
    """Counts how often the same ranks have been started with the same store."""


def how_started(environment: Mapping[str, str] = os.environ) -> Started | None:
    """Return this process's place, or ``None`` where nobody but a user started it.

    Raises:
        ConfigError: some of the variables are missing, or are no numbers.
    """
    if "RANK" in environment:
        return _by_torchrun(environment)
    # A batch script itself has SLURM_PROCID too; only what srun starts is in a step.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and _slurm_tasks(environment) > 1:
        return _by_srun(environment)
    return None


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether our own launcher started this process and tells the user how it ends."""
    return LAUNCHER in environment


def wants_traceback(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the user asked for tracebacks; `run` takes the option out of `sys.argv`."""
    return "--traceback" in sys.orig_argv or environment.get("LLMT_TRACEBACK", "") not in ("", "0")


def host_name() -> str:
    """Return what messages call this machine."""
    return socket.gethostname()


def name_of(rank: int, host: str) -> str:
    """Return what messages call a rank."""
    return f"rank {rank} ({host})"


@contextmanager
def told_once_a_machine() -> Iterator[None]:
    """Keep all but one process of a machine from telling an error that comes before the ranks have met."""
    try:
        yield
    except LlmtError as error:
        started = how_started()
        if started is not None and started.world > 1:
            error.is_told = started.local_rank > 0
            error.args = (f"{name_of(started.rank, host_name())}: {error}",)
        raise


def end_at_once(error: BaseException) -> None:
    """End a worker that left its group open, as its last act.

    Ending in order would wait for ranks that do not answer, or abort with a signal and so with another exit code.
    """
    distributed = sys.modules.get("torch.distributed")
    is_worker = "RANK" in os.environ or "SLURM_PROCID" in os.environ
    if not is_worker or distributed is None or not distributed.is_initialized():
        return
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    else:
        traceback.print_exception(error)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def first_host(node_list: str) -> str:
    """Return the first name of SLURM's short form.

    >>> first_host("gpu-[003-005,011]-ib,login")
    'gpu-003-ib'
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    assert first is not None
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]).strip()


def _by_torchrun(environment: Mapping[str, str]) -> Started:
    if missing := [name for name in _TORCHRUN if name not in environment]:
        raise ConfigError(
            f"environment: RANK is set, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not; "
            "start with torchrun, or unset RANK"
        )
    return Started(
        rank=_number(environment, "RANK"),
        world=_number(environment, "WORLD_SIZE"),
        local_rank=_number(environment, "LOCAL_RANK"),
        local_world=_number(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else None,
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        has_store=is_launched(environment) or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _by_srun(environment: Mapping[str, str]) -> Started:
    lists = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    nodes = next((environment[name] for name in lists if name in environment), "")
    if not nodes and "MASTER_ADDR" not in environment:
        raise ConfigError(f"environment: srun started this, but {' and '.join(lists)} are not set; set MASTER_ADDR")
    # All ranks must come to the same port, jobs of one machine to different ones; systems hand out ports above 32 767.
    port = 15_000 + (_number(environment, "SLURM_JOB_ID") * 7 + _number(environment, "SLURM_STEP_ID")) % 15_000
    return Started(
        rank=_number(environment, "SLURM_PROCID"),
        world=_slurm_tasks(environment),
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_world=None,
        address=environment.get("MASTER_ADDR") or first_host(nodes),
        port=_number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else port,
        has_store=False,
        by_slurm=True,
    )


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    return _number(environment, name)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not text.isdecimal():
        raise ConfigError(f"environment: {name} is {'not set' if text is None else repr(text)}; wanted a number")
    return int(text)
