"""What is asked of a dataset below a URL is answered as of the same dataset on a disk, sound or damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import object_store
import pytest
import small_datasets
from typer.testing import CliRunner

from llmt_prep.cli import app
from llmt_prep.inspection import inspect_row
from llmt_prep.raw import inspect_record
from llmt_prep.stats import dataset_stats
from llmt_prep.verify import find_problems
from llmt_shared.dataset import open_dataset
from llmt_shared.objects import ObjectPath

KINDS = ["pretrain", "sft", "preference"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {kind: small_datasets.build_kind(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def urls(server: object_store.Server, sound: dict[str, Path]) -> dict[str, ObjectPath]:
    return {kind: object_store.upload(server, path, kind) for kind, path in sound.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_local_copy(sound, urls, kind):
    ours, theirs = (dataset_stats(open_dataset(place)) for place in (urls[kind], sound[kind]))
    assert ours.path == f"s3://bucket/{kind}"
    assert ours.model_copy(update={"path": ""}) == theirs.model_copy(update={"path": ""})


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_shown_as_that_of_the_local_copy_and_fetches_no_other(sound, urls, server, kind):
    remote, local = open_dataset(urls[kind]), open_dataset(sound[kind])
    server.seen.clear()
    assert inspect_row(remote, "train", 3) == inspect_row(local, "train", 3)
    assert len(server.fetched("/train/tokens/")) == 1
    assert server.fetched("/validation/") == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_is_shown_as_of_the_local_copy(sound, urls, kind):
    said = f"{'web' if kind == 'pretrain' else 'one'}:5"
    assert inspect_record(open_dataset(urls[kind]), said) == inspect_record(open_dataset(sound[kind]), said)


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    )


def unknown(tokens: np.ndarray) -> None:
    tokens[2, 0] = 60_000  # more than the tokenizer has


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "sound": lambda _: None,
    "flipped tokens": lambda path: flip(path / "train/tokens/c/1/0"),
    "flipped ledger": lambda path: flip(path / "ledger.json"),
    "flipped manifest": lambda path: flip(path / "MANIFEST.json"),
    "flipped list of files": lambda path: flip(path / "files.parquet"),
    "truncated offsets": lambda path: (path / "train/row_offsets/c/0").write_bytes(b"short"),
    "longer mix": lambda path: (path / "mix.json").write_bytes((path / "mix.json").read_bytes() + b"\n"),
    "missing shard": lambda path: (path / "train/tokens/c/0/0").unlink(),
    "missing group": lambda path: (path / "zarr.json").unlink(),
    "missing tokenizer": lambda path: (path / "tokenizer/tokenizer.json").unlink(),
    "unlisted file": lambda path: (path / "train/extra").write_bytes(b"x"),
    "wrong tokens": lambda path: small_datasets.rewrite(path, "train/tokens", unknown),
    "wrong sums": lambda path: small_datasets.reseal(path, length=47),
}


@pytest.mark.parametrize("kind", [pytest.param("pretrain", marks=pytest.mark.slow), "preference"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_findings_are_those_of_the_local_copy(sound, server, tmp_path, kind, damage):
    local = small_datasets.copy(sound[kind], tmp_path / "data")
    DAMAGES[damage](local)
    remote = object_store.upload(server, local, f"damaged/{kind}/{damage}/data")
    ours, theirs = find_problems(remote), find_problems(local)
    told = [each.model_copy(update={"message": each.message.replace(str(remote), "HERE")}) for each in ours]
    wanted = [each.model_copy(update={"message": each.message.replace(str(local), "HERE")}) for each in theirs]
    assert told == wanted
    assert bool(wanted) == (damage != "sound")
    shutil.rmtree(local)


@pytest.mark.parametrize("command", [["verify"], ["stats"], ["inspect", "--row", "0"], ["inspect", "--raw", "web:0"]])
def test_each_command_takes_a_url(urls, command):
    name, *options = command
    result = CliRunner().invoke(app, [name, str(urls["pretrain"]), *options])
    assert result.exit_code == 0, result.output
    assert result.stdout


@pytest.mark.parametrize("command", ["verify", "stats"])
@pytest.mark.parametrize("url", ["s3://bucket/nothing", "s3://elsewhere/nothing"])
def test_no_dataset_is_one_message(server, command, url):
    result = CliRunner().invoke(app, [command, url])
    assert result.exit_code == 3 or getattr(result.exception, "exit_code", None) == 3
    assert f"{url}: no dataset (MANIFEST.json: no such " in result.stdout + str(result.exception)


def test_verify_without_access_is_one_message(urls, server, without_faults):
    server.faults = object_store.Faults(refused=1)
    result = CliRunner().invoke(app, ["verify", str(urls["pretrain"])])
    assert getattr(result.exception, "exit_code", None) == 2
    assert "the store refuses access" in str(result.exception)
