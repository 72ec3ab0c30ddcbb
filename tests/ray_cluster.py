"""Ray clusters of raylets on this machine, for tests."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


def kill_node(node: Any) -> None:
    """End a node as a power cut does: its raylet, and all workers of it."""
    (raylet,) = (each.process.pid for each in node.all_processes["raylet"])
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(raylet)], capture_output=True, text=True, check=False)
    for pid in [raylet, *map(int, listed.stdout.split())]:
        os.kill(pid, signal.SIGKILL)
