"""Training on data below a URL is training on a local copy, bit for bit, whatever the store and the network do."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import object_store
import pytest
import torch
from train.cache.held_bytes import watched
from train.interrupted import curve, interrupt, started
from train.test_fit import make_config
from train.tiny_dataset import write_dataset

from llmt_shared import objects
from llmt_shared.dataset import open_dataset
from llmt_shared.errors import ConfigError, FormatError, StoreError
from llmt_shared.objects import ObjectPath
from llmt_shared.order import Blocks, block_at
from llmt_train.cache import chunks
from llmt_train.config import RunConfig
from llmt_train.fit import fit

pytestmark = pytest.mark.usefixtures("without_faults")

BLOCK = 2
"""Shards that are shuffled together."""


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks for room as often as is right for steps of some milliseconds."""
    monkeypatch.setattr(chunks, "_PAUSE", 0.02)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    return write_dataset(folder, num_rows=500, length=32, rows_per_shard=25, validation_rows=30)


@pytest.fixture(scope="module")
def url(server: object_store.Server, data: Path) -> ObjectPath:
    return object_store.upload(server, data, "tiny")


@pytest.fixture(scope="module")
def quarter(data: Path) -> int:
    return sum(entry.bytes for entry in open_dataset(data).manifest.files) // 4


def config_of(data: Path | ObjectPath, output: Path, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "batch": {"tokens": 16 * 32, "micro_rows": 4},
        "train": {"epochs": 1.5, "seed": 3, "shuffle_shards": BLOCK},
        "eval": {"every": 20},
        "save": {"every": 10, "keep": 2},
    }
    return make_config(data, output, **(settings | changes))


@pytest.fixture(scope="module")
def wanted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The curve of a run on the local copy."""
    output = tmp_path_factory.mktemp("local") / "run"
    fit(config_of(data, output))
    return curve(output)


def test_the_curve_is_the_local_one_with_room_for_a_quarter_of_the_data(wanted, url, quarter, tmp_path):
    cache = {"path": tmp_path / "cache", "size": quarter}
    with watched(tmp_path / "cache", quarter) as most:
        fit(config_of(url, tmp_path / "run", cache=cache))
    assert curve(tmp_path / "run") == wanted
    assert quarter // 2 < most[0] <= quarter


def test_with_room_for_all_each_chunk_comes_once(wanted, url, server, tmp_path):
    fit(config_of(url, tmp_path / "run", cache={"path": tmp_path / "cache", "size": "100MB"}))
    assert curve(tmp_path / "run") == wanted
    assert set(Counter(server.fetched("/c/")).values()) == {1}


def test_a_second_run_finds_everything_there(wanted, url, server, tmp_path):
    cache = {"path": tmp_path / "cache", "size": "100MB"}
    fit(config_of(url, tmp_path / "first", cache=cache))
    server.seen.clear()
    fit(config_of(url, tmp_path / "second", cache=cache))
    assert curve(tmp_path / "second") == wanted
    assert server.fetched("/c/") == []


def test_faults_change_nothing_but_the_time(wanted, url, quarter, server, tmp_path):
    server.faults = object_store.Faults(error=0.05, truncated=0.05, flipped=0.05, stalled=0.002)
    fit(config_of(url, tmp_path / "run", cache={"path": tmp_path / "cache", "size": quarter}))
    assert curve(tmp_path / "run") == wanted
    assert all(server.met[name] for name in ("error", "truncated", "flipped"))


def test_a_store_that_stays_away_ends_the_run_with_one_message(url, quarter, server, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "PATIENCE", 0.2)
    server.faults = object_store.Faults(error=1, only="/tokens/c/")
    with pytest.raises(StoreError, match=r"s3://bucket/tiny/train/tokens/c/\d+/0: no right answer for .* 503"):
        fit(config_of(url, tmp_path / "run", cache={"path": tmp_path / "cache", "size": quarter}))


def test_a_run_goes_on_where_the_store_failed(wanted, url, quarter, server, tmp_path, monkeypatch):
    config = config_of(url, tmp_path / "run", cache={"path": tmp_path / "cache", "size": quarter})
    late = block_at(3, 0, 300, 500, Blocks(25, BLOCK)).shards[0]
    with monkeypatch.context() as patch:
        patch.setattr(objects, "PATIENCE", 0.2)
        server.faults = object_store.Faults(error=1, only=f"/train/tokens/c/{late}/0")
        with pytest.raises(StoreError):
            fit(config)
    assert (tmp_path / "run" / "checkpoints" / "step-00000010").exists()
    server.faults = object_store.Faults()
    fit(config)
    assert curve(tmp_path / "run") == wanted


def test_a_shard_that_is_damaged_in_the_store_is_named(data, server, quarter, tmp_path):
    url = object_store.upload(server, data, "damaged")
    content = (url / "train/tokens/c/3/0").read_bytes()
    (url / "train/tokens/c/3/0").write_bytes(content[:100] + b"?" + content[101:])
    with pytest.raises(FormatError, match=r"damaged/train/tokens/c/3/0: sha256 is .*, also when it is read again"):
        fit(config_of(url, tmp_path / "run", cache={"path": tmp_path / "cache", "size": quarter}))


def test_a_killed_run_goes_on_from_the_same_cache(wanted, url, quarter, tmp_path):
    config = config_of(url, tmp_path / "run", cache={"path": tmp_path / "cache", "size": quarter})
    interrupt(config, 13)
    fit(config)
    assert curve(tmp_path / "run") == wanted


@pytest.mark.parametrize("share", [1, 100], ids=["a quarter", "everything"])
def test_two_processes_share_what_one_has_fetched(wanted, url, quarter, server, tmp_path, share):
    cache = {"path": tmp_path / "cache", "size": quarter * share}
    with watched(tmp_path / "cache", quarter * share) as most:
        processes = [started(config_of(url, tmp_path / name, cache=cache)) for name in ("one", "two")]
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert curve(tmp_path / "one") == curve(tmp_path / "two") == wanted
    assert most[0] <= quarter * share
    if share == 100:
        assert set(Counter(server.fetched("/c/")).values()) == {1}


@pytest.mark.slow
def test_ranks_of_one_run_share_the_cache(data, url, quarter, server, tmp_path):
    """Against two ranks on the local copy, whose sums are in the same order."""
    cache = {"path": str(tmp_path / "cache"), "size": quarter}
    for name, where in (("local", data), ("remote", url)):
        config = config_of(where, tmp_path / name, cache=cache, parallel={"dp": 2})
        (tmp_path / f"{name}.yaml").write_text(config.model_dump_json())
        command = [sys.executable, "-m", "llmt_train", "fit", "--config", str(tmp_path / f"{name}.yaml")]
        environment = os.environ | object_store.environment(server) | {"OMP_NUM_THREADS": "1"}
        with watched(tmp_path / "cache", quarter) as most:
            subprocess.run(command, env=environment, check=True)
        assert most[0] <= quarter
    assert curve(tmp_path / "remote") == curve(tmp_path / "local")


def test_a_cache_without_room_for_a_block_is_refused_with_what_would_fit(url, quarter, tmp_path):
    train, cache = {"epochs": 1, "shuffle_shards": 9}, {"path": tmp_path / "cache", "size": quarter}
    said = r"cache.size: \d+ bytes cannot hold .*train.shuffle_shards 9 needs \d+; set .* or train.shuffle_shards [1-8]"
    with pytest.raises(ConfigError, match=said):
        fit(config_of(url, tmp_path / "run", train=train, cache=cache))


def test_a_config_with_a_url_is_saved_and_read_again(url, tmp_path):
    config = config_of(url, tmp_path / "run")
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert torch.get_num_threads() == 1
