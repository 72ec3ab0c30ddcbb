"""Ray clusters of raylets on this machine, for tests."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from llmt_prep.executor import Executor, opened

TESTS = Path(__file__).parent
MEMORY = 100_000_000
"""Bytes that a task declares."""
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 8}
"""That a node is gone is seen after 8 s, and not after 20; a busy machine may keep a living one silent for 2."""


@contextmanager
def running_cluster(cpus: tuple[int, ...] = (1, 1)) -> Iterator[Any]:
    """Start a head and further nodes, with so many CPUs each; all that it writes lies in a folder of its own."""
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [*sys.path, TESTS])))  # of the workers, too
        patch.delenv("RAY_ADDRESS", raising=False)
        head = node_of(cpus[0], _system_config=SOON)
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for more in cpus[1:]:
                cluster.add_node(**node_of(more))
            yield cluster
        finally:
            cluster.shutdown()
            patch.undo()


def node_of(cpus: int, **more: Any) -> dict[str, Any]:
    """Arguments of a node."""
    return {"num_cpus": cpus, "include_dashboard": False, "memory": 8 * MEMORY, **more}


@contextmanager
def joined(cluster: Any, workers: int | None = None, **more: Any) -> Iterator[Executor]:
    """An executor on a cluster."""
    with opened("ray", workers, **{"address": cluster.address, "memory": MEMORY, **more}) as executor:
        yield executor


def raylet_of(node: Any) -> int:
    """The process whose children are a node's workers."""
    (raylet,) = node.all_processes["raylet"]
    return int(raylet.process.pid)


def kill_node(node: Any) -> None:
    """End a node as a power cut does: its raylet, and all workers of it."""
    for pid in [raylet_of(node), *_workers(node)]:
        with suppress(ProcessLookupError):  # a worker whose raylet is gone ends by itself
            os.kill(pid, signal.SIGKILL)


def kill_busy_node(node: Any) -> bool:
    """End a node likewise where a task runs on it, and tell whether it was so."""
    os.kill(raylet_of(node), signal.SIGSTOP)  # no worker comes meanwhile
    for pid in _workers(node):
        os.kill(pid, signal.SIGSTOP)
    is_busy = any(title.removeprefix("ray::").islower() for title in _workers(node).values())  # else IDLE, or an agent
    if is_busy:
        kill_node(node)
    else:
        for pid in [*_workers(node), raylet_of(node)]:
            os.kill(pid, signal.SIGCONT)
    return is_busy


def _workers(node: Any) -> dict[int, str]:
    """Processes of a node, with what each does: ``ray::`` and the name of a function, of an agent or IDLE."""
    command = ["ps", "-o", "pid=,args=", "--ppid", str(raylet_of(node))]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    parts = (line.split(None, 1) for line in listed.splitlines())
    return {int(pid): title.strip() for pid, title in parts}
