"""A dataset below a URL opened for training: what is fetched, how often, and what happens when a store fails."""

import errno
import hashlib
import os
import threading
import time
from collections import Counter
from pathlib import Path

import object_store
import pytest
from train.cache.held_bytes import fill, in_all
from train.tiny_dataset import write_dataset

from llmt_shared.dataset import Dataset, open_dataset
from llmt_shared.errors import ConfigError, FormatError
from llmt_shared.manifest import FileEntry, read_manifest
from llmt_shared.objects import ObjectPath
from llmt_shared.order import Blocks, block_at
from llmt_train.cache import chunks
from llmt_train.cache.distance import Following
from llmt_train.cache.folder import CacheFolder, Outcome
from llmt_train.cache.open import open_cached
from llmt_train.cache.readers import Reader
from llmt_train.config import BatchConfig, CacheConfig, TrainConfig
from llmt_train.data.stream import Prefetched, plan_run, train_batches

pytestmark = pytest.mark.usefixtures("without_faults")

BLOCK = 4
LENGTH = 512
LAST = block_at(0, 0, 1999, 2000, Blocks(100, BLOCK)).shards[-1]
"""A shard of the last block."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens are most of it, as in real datasets: a shard of them has 100 kB."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    return write_dataset(folder, num_rows=2000, length=LENGTH, rows_per_shard=100, validation_rows=30)


@pytest.fixture(scope="module")
def url(server: object_store.Server, data: Path) -> ObjectPath:
    return object_store.upload(server, data, "tiny")


def size_of(data: Path, text: str) -> int:
    return sum(entry.bytes for entry in open_dataset(data).manifest.files if text in f"/{entry.path}")


def take_all(dataset: Dataset, epochs: float = 1, seconds: float = 0.0) -> int:
    plan = plan_run(
        dataset.train, BatchConfig(tokens=16 * LENGTH, micro_rows=8), TrainConfig(epochs=epochs, shuffle_shards=BLOCK)
    )
    count = 0
    for _ in train_batches(dataset.train, plan):
        count += 1
        time.sleep(seconds)
    return count


def everything_but_tokens(data: Path) -> int:
    total = size_of(data, "")
    return total - size_of(data, "/train/tokens/c/")


def fetches_of_shards(data: Path, url: ObjectPath, server: object_store.Server, cache: Path, blocks: float) -> set[int]:
    """How often shards of tokens are fetched in an epoch, with room for so many blocks of them."""
    size = everything_but_tokens(data) + int(blocks * BLOCK * size_of(data, "/train/tokens/c/0/"))
    take_all(open_cached(url, CacheConfig(path=cache, size=size), BLOCK), seconds=0.004)
    return set(Counter(server.fetched("/train/tokens/c/")).values())


@pytest.mark.parametrize("blocks", [1, 1.5, 2])
def test_with_room_for_one_to_two_blocks_each_shard_comes_once_in_an_epoch(
    data, url, server, tmp_path, monkeypatch, blocks
):
    monkeypatch.setattr(chunks, "_PAUSE", 0.001)  # steps take longer than a look for room, as in real runs
    assert fetches_of_shards(data, url, server, tmp_path, blocks) == {1}


def test_while_a_block_is_being_ranked_nothing_of_the_one_before_is_fetched_again(
    data, url, server, tmp_path, monkeypatch
):
    """Its files go first then, and a thread that still has its list would see them missing."""
    rank = chunks.CachedChunks._ranked
    monkeypatch.setattr(chunks, "_PAUSE", 0.005)
    monkeypatch.setattr(chunks.CachedChunks, "_ranked", lambda self, run: [rank(self, run), time.sleep(0.05)][0])
    assert fetches_of_shards(data, url, server, tmp_path, 1.75) == {1}


def test_opening_keeps_the_limit_though_all_that_is_there_is_needed_now(url, tmp_path):
    folder = CacheFolder(tmp_path, 3_000_000)
    reader = folder.join("other")
    reader.tell(Following(0, 3000, 3000, 1, 3000, 0))
    for number in range(3000):
        folder.path.joinpath("other", "train", "tokens", "c", str(number)).mkdir(parents=True)
        folder.path.joinpath("other", "train", "tokens", "c", str(number), "0").write_bytes(bytes(1000))
    open_cached(url, CacheConfig(path=tmp_path, size=folder.limit), BLOCK)
    assert in_all(folder) <= folder.limit
    reader.close()


def test_what_was_copied_when_a_dataset_is_opened_stays_until_it_is_open(data, url, tmp_path, monkeypatch):
    """Others may need the room at any moment."""
    join = CacheFolder.join

    def join_late(folder: CacheFolder, dataset: str) -> Reader:
        with folder.deciding():
            assert folder.make_room(folder.limit, -1)
        return join(folder, dataset)

    monkeypatch.setattr(CacheFolder, "join", join_late)
    dataset = open_cached(url, CacheConfig(path=tmp_path, size=10 * size_of(data, "")), BLOCK)
    assert dataset.train.tokens([0]).shape == (1, LENGTH)


def test_opening_from_a_slow_store_keeps_no_other_run_waiting(url, server, tmp_path):
    server.faults = object_store.Faults(stalled=1, stall=60, only="tokenizer.json")
    opening = threading.Thread(target=open_cached, args=(url, CacheConfig(path=tmp_path), BLOCK))
    opening.start()
    while not server.met["stalled"]:
        time.sleep(0.01)
    folder = CacheFolder(tmp_path, 10**9)
    assert folder.fetch(folder.path / "other" / "file", 1000, fill, -1) is Outcome.THERE
    assert opening.is_alive()
    server.faults = object_store.Faults()
    opening.join()


def test_the_manifest_is_read_once_so_that_no_two_datasets_mix(url, server, tmp_path):
    open_cached(url, CacheConfig(path=tmp_path), BLOCK)
    assert len(server.fetched("MANIFEST.json")) == 1


def test_a_validation_file_without_room_is_refused_before_the_first_step(server, tmp_path):
    folder = write_dataset(tmp_path / "data", num_rows=100, length=256, rows_per_shard=2, validation_rows=500)
    url = object_store.upload(server, folder, "large-validation")
    with pytest.raises(ConfigError, match=r"cache.size: 200000 bytes cannot hold .*validation/tokens/c/0/0 .*at least"):
        open_cached(url, CacheConfig(path=tmp_path / "cache", size=200_000), 2)


@pytest.fixture
def uncaught(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """What ends a thread with a traceback."""
    found: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: found.append(args.exc_value))
    return found


def test_a_store_that_begins_to_refuse_ends_the_run_with_one_message(
    url, server, tmp_path, uncaught, capsys, monkeypatch
):
    monkeypatch.setattr(chunks, "_PAUSE", 0.005)
    dataset = open_cached(url, CacheConfig(path=tmp_path), BLOCK)
    server.faults = object_store.Faults(refused=1, only=f"/train/tokens/c/{LAST}/0")
    with pytest.raises(ConfigError, match=rf"tokens/c/{LAST}/0: the store refuses access"):
        take_all(dataset, seconds=0.005)
    assert uncaught == []
    assert capsys.readouterr().err == ""


def test_a_disk_that_is_full_for_threads_alone_ends_nothing(url, tmp_path, uncaught, monkeypatch):
    dataset = open_cached(url, CacheConfig(path=tmp_path), BLOCK)
    reserve = os.posix_fallocate

    def fail(*where: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*where)

    monkeypatch.setattr(os, "posix_fallocate", fail)
    assert take_all(dataset, seconds=0.002) == 250
    assert uncaught == []


def test_a_shard_that_was_removed_from_the_store_is_named(data, server, tmp_path, uncaught):
    url = object_store.upload(server, data, "removed")
    dataset = open_cached(url, CacheConfig(path=tmp_path), BLOCK)
    for number in range(20):
        (url / f"train/tokens/c/{number}/0").unlink()
    with pytest.raises(FormatError, match=r"removed/train/tokens/c/\d+/0: is not there any more; .*pack it again"):
        take_all(dataset)
    assert uncaught == []


def test_a_shard_that_was_replaced_by_a_shorter_one_is_named_and_the_log_is_not_filled(
    data, server, tmp_path, uncaught, capsys, monkeypatch
):
    monkeypatch.setattr(chunks, "_PAUSE", 0.005)
    url = object_store.upload(server, data, "replaced")
    dataset = open_cached(url, CacheConfig(path=tmp_path), BLOCK)
    (url / f"train/tokens/c/{LAST}/0").write_bytes(b"short")
    with pytest.raises(FormatError, match=rf"replaced/train/tokens/c/{LAST}/0: has 5 bytes; wanted .*pack it again"):
        take_all(dataset, seconds=0.005)
    assert uncaught == []
    assert len(capsys.readouterr().err.splitlines()) <= 1


def test_a_cache_that_is_removed_under_a_run_is_named(data, url, tmp_path, uncaught, monkeypatch):
    monkeypatch.setattr(chunks, "_PAUSE", 0.005)
    dataset = open_cached(url, CacheConfig(path=tmp_path / "cache", size=everything_but_tokens(data) + 500_000), BLOCK)
    threading.Timer(0.5, os.rename, [tmp_path / "cache", tmp_path / "moved"]).start()
    with pytest.raises(FileNotFoundError, match=r"cache/llmt-chunks"):
        take_all(dataset, seconds=0.02)
    assert uncaught == []


def test_a_stream_ends_when_it_is_closed_though_the_store_is_away(data, url, server, tmp_path):
    """And so does the process: it waits for the threads of requests."""
    dataset = open_cached(url, CacheConfig(path=tmp_path, size=everything_but_tokens(data) + 500_000), BLOCK)
    train = TrainConfig(epochs=50, shuffle_shards=BLOCK)
    plan = plan_run(dataset.train, BatchConfig(tokens=16 * LENGTH, micro_rows=8), train)
    batches = Prefetched(lambda: train_batches(dataset.train, plan), depth=10_000)
    next(iter(batches))
    server.faults = object_store.Faults(error=1)
    time.sleep(3)
    started = time.monotonic()
    batches.close()
    while any(thread.name.startswith("llmt-object") for thread in threading.enumerate()):
        assert time.monotonic() < started + 20
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["train/tokens/c/9999/0", "train/more/c/0"])
def test_a_chunk_that_the_manifest_lists_and_no_array_has_is_left_where_it_is(data, server, tmp_path, name):
    manifest, _ = read_manifest(data)
    more = FileEntry(path=name, bytes=1, sha256=hashlib.sha256(b"x").hexdigest())
    url = object_store.upload(server, data, name.replace("/", "-"))
    (url / name).write_bytes(b"x")
    content = manifest.model_copy(update={"files": (*manifest.files, more)}).model_dump_json()
    (url / "MANIFEST.json").write_bytes(content.encode())
    assert take_all(open_cached(url, CacheConfig(path=tmp_path), BLOCK)) == 250
