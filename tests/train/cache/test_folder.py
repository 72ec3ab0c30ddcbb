"""Whatever processes do with a cache, it never holds more than its limit, and a file that is there is whole."""

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import BinaryIO
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from train.cache.held_bytes import SIZE, fill, in_all

from llmt_shared.errors import ConfigError
from llmt_train.cache import readers
from llmt_train.cache.distance import Following
from llmt_train.cache.folder import CacheFolder, Outcome
from llmt_train.reference import overlay_path


def shard(folder: CacheFolder, number: int) -> Path:
    return folder.path / "data" / "train" / "tokens" / "c" / str(number) / "0"


def held(folder: CacheFolder) -> set[int]:
    return {int(path.parent.name) for path in (folder.path / "data").rglob("0") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> CacheFolder:
    """Room for three shards; a run that takes shards 0, 1, 2, .. stands at shard 1."""
    return CacheFolder(tmp_path / "cache", 3 * SIZE)


class Order:
    """One shard in a block, so that the order of shards is known."""

    def __init__(self, folder: CacheFolder, num_shards: int = 9) -> None:
        self.run = Following(3, num_shards, 10**9, 1, 1, 0)
        self.reader = folder.join("data")
        self.reader.tell(self.run)

    def shards(self, count: int) -> list[int]:
        from llmt_shared.order import endless_rows

        return endless_rows(3, 0, count, self.run.num_rows, self.run.blocks).tolist()


def test_a_file_is_fetched_once_and_then_there(folder):
    calls: list[BinaryIO] = []

    def write(file: BinaryIO) -> None:
        calls.append(file)
        fill(file)

    for _ in range(3):
        assert folder.fetch(shard(folder, 0), SIZE, write, -1) is Outcome.THERE
    assert len(calls) == 1
    assert shard(folder, 0).read_bytes() == b"x" * SIZE


def test_the_room_is_taken_before_the_bytes_come(folder):
    seen = []

    def write(file: BinaryIO) -> None:
        seen.append(os.fstat(file.fileno()).st_size)
        fill(file)

    folder.fetch(shard(folder, 0), SIZE, write, -1)
    assert seen == [SIZE]


def test_what_is_used_last_goes_first(folder):
    order = Order(folder)
    first, second, third, fourth = order.shards(4)
    for number in (fourth, first, second, third):
        assert folder.fetch(shard(folder, number), SIZE, fill, -1) is Outcome.THERE
    assert held(folder) == {first, second, third}
    order.reader.close()


def test_nothing_goes_for_what_is_used_later(folder):
    order = Order(folder)
    *soon, later = order.shards(4)
    for number in soon:
        folder.fetch(shard(folder, number), SIZE, fill, -1)
    assert folder.fetch(shard(folder, later), SIZE, fill, 3.0) is Outcome.FULL
    assert held(folder) == set(soon)
    order.reader.close()


def test_a_file_is_needed_when_any_reader_needs_it(folder):
    ahead, behind = Order(folder), Order(folder)
    first, *others = ahead.shards(4)
    ahead.reader.tell(ahead.run._replace(place=1))
    for number in (first, *others[:2]):
        folder.fetch(shard(folder, number), SIZE, fill, -1)
    assert folder.fetch(shard(folder, others[2]), SIZE, fill, 2.0) is Outcome.FULL
    behind.reader.tell(ahead.run._replace(place=1))
    assert folder.fetch(shard(folder, others[2]), SIZE, fill, 2.0) is Outcome.THERE
    assert first not in held(folder)
    ahead.reader.close()
    behind.reader.close()


def test_a_file_that_is_read_stays(folder):
    for number in range(3):
        folder.fetch(shard(folder, number), SIZE, fill, -1)
    descriptors = [folder.hold(shard(folder, number)) for number in range(3)]
    assert folder.fetch(shard(folder, 3), SIZE, fill, -1) is Outcome.FULL
    os.close(descriptors[1])
    assert folder.fetch(shard(folder, 3), SIZE, fill, -1) is Outcome.THERE
    assert held(folder) == {0, 2, 3}
    for descriptor in (descriptors[0], descriptors[2]):
        os.close(descriptor)


def test_what_fails_leaves_nothing(folder):
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise ValueError("on the way")

    with pytest.raises(ValueError, match="on the way"):
        folder.fetch(shard(folder, 0), SIZE, fail, -1)
    assert in_all(folder) == 0


def test_a_part_that_goes_while_it_is_taken_over_is_not_written_to(folder):
    """Who fails removes its part without asking: another that has just opened it must not fill a file without name."""
    lock = fcntl.flock

    def remove_before(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_EX | fcntl.LOCK_NB:
            Path(f"{shard(folder, 0)}.part").unlink()
        lock(descriptor, how)

    with patch.object(fcntl, "flock", remove_before):
        assert folder.fetch(shard(folder, 0), SIZE, fill, -1) is Outcome.BUSY
    assert folder.fetch(shard(folder, 0), SIZE, fill, -1) is Outcome.THERE


def _locked_as_on_nfs(descriptor: int, how: int) -> None:
    if how & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def test_on_nfs_which_locks_only_what_is_open_for_writing_files_go_too(folder):
    with patch.object(fcntl, "flock", _locked_as_on_nfs):
        for number in range(4):
            assert folder.fetch(shard(folder, number), SIZE, fill, -1) is Outcome.THERE
    assert len(held(folder)) == 3


def test_two_readers_that_have_the_same_process_number_are_two(folder):
    """As in containers that share a cache and the host's name."""
    with patch.object(readers, "_numbers", count()):
        first = folder.join("data")
    with patch.object(readers, "_numbers", count()), ThreadPoolExecutor() as pool:
        second = pool.submit(folder.join, "data")
        try:
            second.result(timeout=5)
            assert len(list(readers.living(folder.path / "readers"))) == 2
        finally:
            first.close()
    second.result().close()


def test_a_full_disk_is_told_with_the_way_out(folder):
    def fail(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch.object(os, "posix_fallocate", fail), pytest.raises(ConfigError, match=r"cache.size: .* disk is full"):
        folder.fetch(shard(folder, 0), SIZE, fill, -1)
    assert in_all(folder) == 0


def test_without_posix_fallocate_as_on_macos_a_part_has_its_size_all_the_same(folder, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    sizes: list[int] = []
    folder.fetch(shard(folder, 0), SIZE, lambda file: sizes.append(os.fstat(file.fileno()).st_size), -1)
    assert sizes == [SIZE]


def _hang(path: Path, limit: int, number: int) -> None:
    folder = CacheFolder(path, limit)
    folder.fetch(shard(folder, number), SIZE, lambda part: time.sleep(60), -1)


def killed_while_fetching(folder: CacheFolder, number: int) -> None:
    arguments = folder.path.parent, folder.limit, number
    process = multiprocessing.get_context("spawn").Process(target=_hang, args=arguments)
    process.start()
    part = Path(f"{shard(folder, number)}.part")
    while not (part.exists() and part.stat().st_size == SIZE):
        time.sleep(0.01)
    assert folder.fetch(shard(folder, number), SIZE, fill, -1) is Outcome.BUSY
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_what_a_killed_process_was_fetching_is_fetched_by_the_next(folder):
    killed_while_fetching(folder, 0)
    folder.wait_for(shard(folder, 0))
    assert folder.fetch(shard(folder, 0), SIZE, fill, -1) is Outcome.THERE
    assert in_all(folder) == SIZE


def test_what_a_killed_process_was_fetching_makes_room(folder):
    order = Order(folder)
    killed_while_fetching(folder, 8)
    for number in order.shards(3):
        folder.fetch(shard(folder, number), SIZE, fill, 0.0)
    assert held(folder) == set(order.shards(3))
    order.reader.close()


@given(wishes=st.lists(st.tuples(st.integers(0, 8), st.sampled_from([-1.0, 0.0, 2.0, 5.0])), max_size=30))
def test_the_limit_holds_and_each_file_comes_once_per_stay_for_any_wishes_of_many_threads(tmp_path_factory, wishes):
    folder = CacheFolder(tmp_path_factory.mktemp("cache"), int(3.5 * SIZE))
    order = Order(folder)
    most = [0]
    came, went, unlink = Counter[Path](), Counter[Path](), Path.unlink

    def wish(mine: list[tuple[int, float]]) -> None:
        for number, distance in mine:
            path = shard(folder, number)

            def write(file: BinaryIO, path: Path = path) -> None:
                came[path] += 1
                fill(file)

            folder.fetch(path, SIZE, write, distance)
            with folder.deciding():
                most[0] = max(most[0], in_all(folder))

    def remove(path: Path, missing_ok: bool = False) -> None:
        went[path] += 1
        unlink(path, missing_ok)

    threads = [threading.Thread(target=wish, args=(wishes[start::3],)) for start in range(3)]
    with patch.object(Path, "unlink", remove):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most[0] <= folder.limit
    assert all(came[path] - went[path] == path.exists() for path in (shard(folder, number) for number in range(9)))
    assert all(shard(folder, number).read_bytes() == b"x" * SIZE for number in held(folder))
    order.reader.close()


def test_what_lies_beside_in_the_users_folder_is_neither_counted_nor_removed(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x" * 10 * SIZE)
    folder = CacheFolder(tmp_path, 3 * SIZE)
    for number in range(4):
        assert folder.fetch(shard(folder, number), SIZE, fill, -1) is Outcome.THERE
    assert (tmp_path / "photos" / "one.jpg").stat().st_size == 10 * SIZE
    assert len(held(folder)) == 3


def test_what_was_computed_from_a_dataset_and_lies_beside_it_stays(folder):
    """`llmt-train ref` writes there."""
    result = overlay_path(folder.path / "data", "0123456789abcdef") / "train.npy"
    result.parent.mkdir(parents=True)
    result.write_bytes(b"x" * 10 * SIZE)
    for number in range(4):
        assert folder.fetch(shard(folder, number), SIZE, fill, -1) is Outcome.THERE
    assert result.exists()
    assert len(held(folder)) == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache.path: .*file/cache: .*; wanted a folder to write to"):
        CacheFolder(tmp_path / "file" / "cache", SIZE)


def test_what_is_not_wanted_any_more_when_its_turn_comes_removes_nothing(folder):
    for number in range(3):
        folder.fetch(shard(folder, number), SIZE, fill, -1)
    wanted, lock = [True], fcntl.flock

    def lock_late(descriptor: int, how: int) -> None:
        lock(descriptor, how)
        wanted[0] = False

    with patch.object(fcntl, "flock", lock_late):
        assert folder.fetch(shard(folder, 3), SIZE, fill, -1, lambda: wanted[0]) is Outcome.UNWANTED
    assert held(folder) == {0, 1, 2}


def test_a_cache_that_is_removed_while_somebody_waits_for_its_lock_is_not_made_anew(folder):
    lock = fcntl.flock

    def lock_late(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_EX and folder.path.exists():
            folder.path.rename(folder.path.with_name("moved"))
        lock(descriptor, how)

    with patch.object(fcntl, "flock", lock_late), pytest.raises(FileNotFoundError):
        folder.fetch(shard(folder, 0), SIZE, fill, -1)
    assert not folder.path.exists()
