"""Tasks on a Ray cluster of two raylets: the contract of the executor, and what becomes of tasks that are lost."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import small_tasks
from ray_cluster import joined, kill_node, node_of, raylet_of, running_cluster

from llmt_prep.executor import dispatch, opened
from llmt_shared.errors import ConfigError, DataError, LlmtError, Stopped

pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with running_cluster() as cluster:
        yield cluster


def test_every_task_gives_its_result_once(cluster: Any) -> None:
    with joined(cluster) as executor:
        assert (executor.workers, executor.hosts) == (2, 1)
        assert sorted(executor.run(small_tasks.square, ((n,) for n in range(40)))) == [(n, n * n) for n in range(40)]
        assert executor.report() == {"executor": "ray", "workers": 2, "nodes": 2, "cpus": 2}


def test_as_many_tasks_run_at_once_as_the_nodes_have_cpus(cluster: Any, tmp_path: Path) -> None:
    with joined(cluster) as executor:
        parents = [parent for _, parent in executor.run(small_tasks.meet, ((tmp_path, n, 2) for n in range(2)))]
    assert sorted(parents) == sorted(raylet_of(node) for node in cluster.list_all_nodes())


def test_one_task_or_none_needs_no_cluster() -> None:
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


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_references_and_tasks_are_dropped_as_results_are_read(cluster: Any, count: int) -> None:
    """What is held is what is under way."""
    import ray

    taken, most = 0, 0

    def tasks() -> Iterator[tuple[int]]:
        nonlocal taken
        for taken in range(count):
            yield (taken,)

    with joined(cluster) as executor:
        for seen, _ in enumerate(executor.run(small_tasks.square, tasks()), 1):
            assert taken - seen <= 4
            if seen % (count // 10) == 0:
                gc.collect()
                most = max(most, sum(type(each) is ray.ObjectRef for each in gc.get_objects()))
                most = max(most, len(ray._private.worker.global_worker.core_worker.get_all_reference_counts()))
    assert taken == count - 1
    assert most < 20


def test_what_a_task_raises_arrives_as_itself(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_GRACE", 60.0)  # Ray may need seconds to pass on that a task shall end
    with joined(cluster) as executor, pytest.raises(DataError) as error:
        list(executor.run(small_tasks.do, [("write", tmp_path), ("fail", tmp_path)]))
    assert str(error.value) == "bad record"
    assert "small_tasks.py" in error.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_costs_another_try(cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with joined(cluster) as executor:
        results = dict(executor.run(small_tasks.die_times, [(tmp_path / str(n), n % 2) for n in range(4)]))
    assert results == dict(enumerate(["survived"] * 4))
    out, err = capfd.readouterr()
    assert re.search(r"a worker process was lost; task [13] is done again, try 2 of 4", err)
    assert out == ""


def test_a_task_that_kills_every_worker_stops_the_run_and_is_named(cluster: Any, tmp_path: Path) -> None:
    with joined(cluster) as executor, pytest.raises(Stopped, match=r"4 tries at task 1, die_times\(.* again to go on"):
        list(executor.run(small_tasks.die_times, [(tmp_path / str(n), 9 * n) for n in range(2)]))


def test_a_lost_node_costs_time_only_and_a_line(
    cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    node = cluster.add_node(**node_of(2))
    raylet = raylet_of(node)

    def lose_node() -> None:
        small_tasks.meet(tmp_path, -1, 5)
        kill_node(node)
        (tmp_path / "killed").touch()

    with joined(cluster) as executor, ThreadPoolExecutor(1) as beside:
        assert executor.workers == 4
        lost = beside.submit(lose_node)
        parents = dict(executor.run(small_tasks.meet, ((tmp_path, n, 6) for n in range(24))))
        lost.result()
    cluster.remove_node(node, allow_graceful=False)
    assert sorted(parents) == list(range(24))
    assert raylet not in parents.values()
    out, err = capfd.readouterr()
    first, *more = err.splitlines()
    assert first.startswith("ray: 3 nodes, 4 CPUs at ")
    assert [line for line in more if not re.search(r" was lost; task \d+ is done again, try 2 of 4", line)] == []
    assert more
    assert out == ""


def test_every_way_of_losing_a_worker_is_a_loss_and_no_other_error_shows_ray() -> None:
    from concurrent.futures import Future

    from ray import exceptions

    from llmt_prep.executor.cluster import _end_of
    from llmt_prep.executor.dispatch import Ended, Lost

    def end(error: BaseException | None, result: Any = None) -> Lost | Ended:
        future: Future[Any] = Future()
        future.set_exception(error) if error else future.set_result(result)
        return _end_of(future)

    crashed, died = exceptions.WorkerCrashedError(), exceptions.NodeDiedError("node")
    lost = exceptions.ObjectLostError("00", None, "")
    assert end(crashed) == Lost("a worker process was lost")
    assert end(died) == end(lost) == Lost("a node of the cluster was lost")
    assert end(exceptions.OutOfMemoryError("memory")) == Lost("a machine was out of memory")
    assert end(None, (None, MemoryError())) == Lost("a worker process had no memory left")
    assert end(None, (3, None)) == Ended(3, None)
    failed = end(exceptions.RayTaskError("serve", "a traceback", ImportError("no llmt_prep")))
    assert isinstance(failed, Ended)
    assert type(failed.error) is LlmtError
    assert str(failed.error) == "Ray could not run a task: no llmt_prep"


# What stops a run before it begins


def test_a_node_with_another_llmt_is_named(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "llmt_shared").mkdir()
    (tmp_path / "llmt_shared" / "__init__.py").write_text("__version__ = '9.9'")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    node = cluster.add_node(**node_of(1, env_vars={"PYTHONPATH": path}))
    try:
        with joined(cluster) as executor, pytest.raises(ConfigError, match=r"has llmt 9\.9 for Python .*; wanted llmt"):
            list(executor.run(small_tasks.square, [(1,), (2,)]))
    finally:
        cluster.remove_node(node)


def test_files_that_a_node_does_not_see_are_named(cluster: Any, tmp_path: Path) -> None:
    missing = tmp_path / "raw"
    with joined(cluster, inputs=[missing]) as executor, pytest.raises(ConfigError, match=f"{missing}: is not there"):
        list(executor.run(small_tasks.square, [(1,), (2,)]))


def test_a_cluster_without_room_is_not_waited_for_for_ever(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmt_prep.executor import cluster as module

    monkeypatch.setattr(module, "_WAIT", 1.5)
    wanted = r"no node has a CPU and 100\.0 GB of memory for a task \(`ray\.memory`\); start one that has"
    with joined(cluster, memory=10**11) as executor, pytest.raises(ConfigError, match=wanted):
        list(executor.run(small_tasks.square, [(1,), (2,)]))
    assert "yet; waiting" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "llmt_prep.executor.cluster", raising=False)
    with pytest.raises(ConfigError, match=r"ray is not installed; run: pip install 'llmt\[ray\]'"), opened("ray", None):
        pass


# A cluster that goes away


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "how"), [("gcs_server", "SIGKILL"), ("gcs_server", "SIGSTOP"), ("raylet", "SIGKILL")]
)
def test_a_cluster_that_is_gone_stops_the_run_without_a_hang(victim: str, how: str) -> None:
    """The head, or the node of this machine; in a process of its own, for Ray would end it."""
    code = (
        "import sys, small_tasks\n"
        "from llmt_prep.executor import cluster, opened\n"
        "cluster._SILENCE, cluster._SECONDS_BETWEEN_LOOKS = 5.0, 1.0\n"
        "from llmt_shared import command\n"
        "def app():\n"
        "    with opened('ray', None, address=sys.argv[1], memory=1000) as executor:\n"
        "        for index, _ in executor.run(small_tasks.slow_square, ((n, 0.2) for n in range(2000))):\n"
        "            print(index, flush=True)\n"
        "command.run(app, 'ray')\n"
    )
    with running_cluster((1,)) as cluster:
        (pid,) = (each.process.pid for each in cluster.head_node.all_processes[victim])
        driver = [sys.executable, "-c", code, cluster.address]
        with subprocess.Popen(driver, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(3):
                process.stdout.readline()
            os.kill(pid, getattr(signal, how))
            started = time.monotonic()
            try:
                _, log = process.communicate(timeout=50)
            finally:
                process.kill()
                os.kill(pid, signal.SIGCONT)  # a stopped process would not end
    assert process.returncode == 4, log
    assert "Traceback" not in log
    wanted = "does not answer any more" if victim == "gcs_server" else "the Ray node of this machine is gone"
    assert wanted in log
    assert "nothing is lost: run the same command again to go on when it is there again" in log
    assert time.monotonic() - started < 40
