"""Tasks on a Ray cluster of two raylets: the contract of the executor, and what becomes of tasks that are lost."""

import gc
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_tasks
from ray_cluster import MEMORY, joined, kill_node, node_of, running_cluster

from llmt_shared.errors import ConfigError, DataError, Stopped

pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with running_cluster() as cluster:
        yield cluster


def test_every_task_gives_its_result_once_and_the_work_is_spread(cluster: Any) -> None:
    with joined(cluster) as executor:
        assert (executor.workers, executor.hosts) == (2, 1)
        assert sorted(executor.run(small_tasks.square, ((n,) for n in range(40)))) == [(n, n * n) for n in range(40)]
        assert executor.report() == {"executor": "ray", "workers": 2, "nodes": 2, "cpus": 2}
        processes = {parent for _, parent in executor.run(small_tasks.parent, ((0.2,) for _ in range(6)))}
    raylets = {each.process.pid for node in cluster.list_all_nodes() for each in node.all_processes["raylet"]}
    assert processes == raylets


def test_one_task_or_none_needs_no_cluster(tmp_path: Path) -> None:
    from llmt_prep.executor import opened

    with opened("ray", None, address="nowhere:1") as executor:
        assert list(executor.run(small_tasks.process, [])) == []
        assert list(executor.run(small_tasks.process, [(1,)])) == [(0, os.getpid())]
        assert executor.report() == {"executor": "ray", "workers": 1, "nodes": 0, "cpus": 0}


def test_a_worker_does_as_this_process_would(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o027)
    try:
        with joined(cluster) as executor:
            found = [facts for _, facts in executor.run(small_tasks.surroundings, [(1,), (2,)])]
    finally:
        os.umask(before)
    assert found == [(str(tmp_path), 0o027, "false", "1")] * 2


def test_references_and_tasks_are_dropped_as_results_are_read(cluster: Any) -> None:
    """20 000 tasks: what is held is what is under way."""
    import ray

    taken, most = 0, 0

    def tasks() -> Iterator[tuple[int]]:
        nonlocal taken
        for taken in range(20_000):
            yield (taken,)

    with joined(cluster) as executor:
        for seen, _ in enumerate(executor.run(small_tasks.square, tasks()), 1):
            assert taken - seen <= 4
            if seen % 2000 == 0:
                gc.collect()
                most = max(most, sum(isinstance(each, ray.ObjectRef) for each in gc.get_objects()))
                most = max(most, len(ray._private.worker.global_worker.core_worker.get_all_reference_counts()))
    assert taken == 19_999
    assert most < 20


def test_what_a_task_raises_arrives_as_itself(cluster: Any, tmp_path: Path) -> None:
    with joined(cluster) as executor, pytest.raises(DataError) as error:
        list(executor.run(small_tasks.do, [("write", tmp_path), ("fail", tmp_path)]))
    assert str(error.value) == "bad record"
    assert "small_tasks.py" in error.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_costs_another_try(
    cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with joined(cluster) as executor:
        results = dict(executor.run(small_tasks.die_times, [(tmp_path / str(n), n % 2) for n in range(4)]))
    assert results == dict(enumerate(["survived"] * 4))
    out, err = capfd.readouterr()
    assert "a worker process was lost; task 1 is done again, try 2 of 4" in err
    assert out == ""


def test_a_task_that_kills_every_worker_stops_the_run_and_is_named(cluster: Any, tmp_path: Path) -> None:
    with joined(cluster) as executor, pytest.raises(Stopped, match=r"4 tries at task 1, die_times\(.* again to go on"):
        list(executor.run(small_tasks.die_times, [(tmp_path / str(n), 9 * n) for n in range(2)]))


def test_a_lost_node_costs_time_only(cluster: Any, tmp_path: Path) -> None:
    node = cluster.add_node(**node_of(2))
    with joined(cluster) as executor:
        assert executor.workers == 4
        results: dict[int, int] = {}
        for index, result in executor.run(small_tasks.slow_square, ((n, 0.3) for n in range(24))):
            results[index] = result
            if len(results) == 4:
                kill_node(node)
    cluster.remove_node(node, allow_graceful=False)
    assert results == {n: n * n for n in range(24)}
