"""Tasks in processes: a stop reaches the parent only, and nothing outlives it."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_tasks

from llmt_prep.executor import local
from llmt_shared.errors import DataError, Stopped

INTERRUPTED = """
import os, signal, sys, threading, time
from llmt_prep.executor import local

signal.signal(signal.SIGINT, signal.default_int_handler)
def interrupt():
    while True:
        time.sleep(0.005)
        os.killpg(0, signal.SIGINT)

if __name__ == "__main__":
    seen = 0
    def count(*_):
        global seen
        seen += 1
    signal.signal(signal.SIGINT, count)
    threading.Thread(target=interrupt, daemon=True).start()
    done = sorted(local(2).run(abs, [(-1,), (-2,), (-3,)]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert done == [(0, 1), (1, 2), (2, 3)] and seen
"""


def test_interrupts_never_reach_a_worker_not_even_while_it_starts(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(INTERRUPTED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def numbered(count: int, taken: list[int]) -> Iterator[tuple[int]]:
    for number in range(count):
        taken.append(number)
        yield (number,)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_task_gives_its_result_once(workers: int, count: int) -> None:
    results = local(workers).run(small_tasks.square, numbered(count, []))
    assert sorted(results) == [(number, number * number) for number in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_taken_only_as_workers_become_free(workers: int) -> None:
    taken: list[int] = []
    for seen, _ in enumerate(local(workers).run(small_tasks.square, numbered(200, taken)), 1):
        assert len(taken) <= seen + workers


def test_no_more_workers_start_than_there_are_tasks() -> None:
    running = 0
    for _ in local(8).run(small_tasks.process, [(1,), (2,)]):
        running = max(running, len(multiprocessing.active_children()))
    assert 1 <= running <= 2


@pytest.mark.parametrize(("name", "value"), [("TOKENIZERS_PARALLELISM", "false"), ("FASTOKENS_BPE_THREADS", "1")])
def test_a_worker_tokenizes_in_one_thread(name: str, value: str) -> None:
    assert [found for _, found in local(2).run(os.getenv, [(name,), (name,)])] == [value, value]


def test_a_single_task_needs_no_process() -> None:
    assert list(local(8).run(small_tasks.process, [(1,)])) == [(0, os.getpid())]


def test_a_worker_that_is_killed_stops_the_run_and_names_its_task(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match=r"killed by SIGKILL in task 1, do\('die', .*same command again") as stopped:
        list(local(2).run(small_tasks.do, [("write", tmp_path), ("die", tmp_path)]))
    assert stopped.value.exit_code == 4
    assert_nothing_is_left(tmp_path)


def test_a_task_that_fails_ends_the_others_and_says_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="bad record") as error:
        list(local(2).run(small_tasks.do, [("write", tmp_path), ("fail", tmp_path)]))
    assert "small_tasks.py" in error.value.__notes__[0]
    assert_nothing_is_left(tmp_path)


def test_an_error_that_cannot_travel_comes_as_text(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="UnpicklableError: 1 and 2"):
        list(local(2).run(small_tasks.do, [("write", tmp_path), ("fail oddly", tmp_path)]))


def test_a_run_that_is_not_read_to_its_end_ends_its_workers() -> None:
    results = local(2).run(small_tasks.square, numbered(100, []))
    next(results)
    results.close()
    assert multiprocessing.active_children() == []


def assert_nothing_is_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []
    assert multiprocessing.active_children() == []


def test_a_worker_without_memory_stops_the_run_with_its_state() -> None:
    with pytest.raises(Stopped, match=r"no memory left; nothing is lost: .* fewer --workers"):
        list(local(2).run(small_tasks.exhaust, [(1,), (2,)]))
