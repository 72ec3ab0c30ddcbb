"""A dataset below a URL opened for training: what is fetched, how often, and what happens when a store fails."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import object_store
import pytest
from train.tiny_dataset import write_dataset

from llmt_shared.dataset import Dataset, open_dataset
from llmt_shared.objects import ObjectPath
from llmt_train.cache import chunks
from llmt_train.cache.open import open_cached
from llmt_train.config import BatchConfig, CacheConfig, TrainConfig
from llmt_train.data.stream import plan_run, train_batches

BLOCK = 4
LENGTH = 512


@pytest.fixture(scope="module")
def server() -> Iterator[object_store.Server]:
    with object_store.serving() as running:
        yield running


@pytest.fixture(autouse=True)
def _without_faults(server: object_store.Server) -> Iterator[None]:
    server.faults = object_store.Faults()
    server.seen.clear()
    yield
    server.faults = object_store.Faults()


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


@pytest.mark.parametrize("blocks", [1, 1.25, 1.5, 1.75, 2])
def test_with_room_for_one_to_two_blocks_each_shard_comes_once_in_an_epoch(
    data, url, server, tmp_path, monkeypatch, blocks
):
    monkeypatch.setattr(chunks, "_PAUSE", 0.005)  # steps take far longer than a look for room, as in real runs
    shard = size_of(data, "/train/tokens/c/0/")
    size = everything_but_tokens(data) + int(blocks * BLOCK * shard)
    take_all(open_cached(url, CacheConfig(path=tmp_path, size=size), BLOCK), seconds=0.02)
    assert set(Counter(server.fetched("/train/tokens/c/")).values()) == {1}
