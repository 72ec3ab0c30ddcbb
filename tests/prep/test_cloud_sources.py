"""Packing from an object store gives the dataset of the local files, whatever the network does meanwhile."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import object_store
import pytest
import small_sources
from ruamel.yaml import YAML
from typer.testing import CliRunner

from llmt_prep import hashes, unit_task
from llmt_prep.cli import app
from llmt_prep.config import MixConfig
from llmt_prep.pipeline import Built, build_dataset, dry_run, explain_cache
from llmt_prep.raw import inspect_record
from llmt_shared import objects
from llmt_shared.dataset import open_dataset
from llmt_shared.errors import ConfigError, DataError, StoreError

pytestmark = pytest.mark.usefixtures("without_faults")

OF_NAMES = {"files.parquet", "mix.json", "quarantine.jsonl", "MANIFEST.json", "run.json"}
"""Files of a dataset that say where its sources lie."""
KINDS = ["pretrain", "sft", "preference"]

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sources.write(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def server(server: object_store.Server, corpus: Path) -> object_store.Server:
    object_store.upload(server, corpus, "raw")
    return server


@pytest.fixture(scope="module")
def mix_of(corpus: Path) -> Make:
    """A mix of a kind with a folder to work in and the root of its sources; ``path`` is of the only source."""

    def make(kind: str, folder: Path, root: Any = "", path: str = "") -> dict[str, Any]:
        changes = {} if kind == "pretrain" else small_sources.chats(kind, root)
        return small_sources.mix(
            folder, corpus, root, **changes, **({"sources": {"a": {"path": path}}} if path else {})
        )

    return make


def build(mix: dict[str, Any], **more: Any) -> Built:
    return build_dataset(MixConfig.model_validate(mix), **{"workers": 1, **more})


@pytest.fixture(scope="module")
def local(mix_of: Make, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """The dataset of each kind from local files."""
    folder = tmp_path_factory.mktemp("local")
    return {kind: build(mix_of(kind, folder / kind, corpus)) for kind in KINDS}


@pytest.fixture(scope="module")
def remote(mix_of: Make, server: object_store.Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """The dataset of each kind from objects."""
    folder = tmp_path_factory.mktemp("remote")
    return {kind: build(mix_of(kind, folder / kind, server.url("raw"))) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_objects_give_the_rows_of_the_local_files(local, remote, kind):
    assert small_sources.differing(local[kind].path, remote[kind].path) <= OF_NAMES


def test_the_dataset_calls_its_files_by_their_urls(remote, server, corpus):
    import pyarrow.parquet as pq

    table = pq.read_table(remote["pretrain"].path / "files.parquet").to_pydict()
    assert table["path"][:2] == ["s3://bucket/raw/web/a.jsonl", "s3://bucket/raw/web/b.jsonl"]
    assert table["bytes"][0] == (corpus / "web/a.jsonl").stat().st_size
    bad = json.loads((remote["pretrain"].path / "quarantine.jsonl").read_text().splitlines()[0])
    assert (bad["file"], bad["record"]) == ("s3://bucket/raw/web/a.jsonl", 5)


def test_workers_and_sizes_of_units_change_nothing(mix_of, remote, server, tmp_path):
    mix = mix_of("pretrain", tmp_path, server.url("raw")) | {"unit_size": 300}
    assert build(mix, workers=2).digest == remote["pretrain"].digest


def test_faults_that_pass_change_nothing_but_the_time(mix_of, remote, server, tmp_path):
    server.faults = object_store.Faults(error=0.05, truncated=0.05, flipped=0.05, stalled=0.02, stall=0.5)
    assert build(mix_of("pretrain", tmp_path, server.url("raw"))).digest == remote["pretrain"].digest
    server.faults = object_store.Faults(error=0.05, truncated=0.05, flipped=0.05)
    assert build(mix_of("sft", tmp_path / "sft", server.url("raw"))).digest == remote["sft"].digest
    assert all(server.met[name] for name in ("error", "truncated", "flipped", "stalled"))


def test_faults_that_stay_end_the_run_and_it_goes_on_later(mix_of, remote, server, tmp_path, monkeypatch):
    mix = mix_of("pretrain", tmp_path, server.url("raw"))
    monkeypatch.setattr(objects, "PATIENCE", 0.3)
    server.faults = object_store.Faults(error=1, only="code.parquet")
    with pytest.raises(StoreError, match=r"raw/code.parquet: no right answer.*run the same command again"):
        build(mix)
    server.faults = object_store.Faults(flipped=1, only="file.arrow")
    with pytest.raises(DataError, match=r"raw/file.arrow: other bytes came each of 8 times"):
        build(mix)
    server.faults = object_store.Faults()
    assert build(mix).digest == remote["pretrain"].digest


def test_what_is_in_the_cache_is_not_fetched_again(mix_of, server, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_UNSETTLED_NS", 0)
    mix = mix_of("pretrain", tmp_path, server.url("raw"))
    build(mix)
    server.seen.clear()
    assert build(mix | {"seed": 99}, force=True).is_new
    assert server.fetched("/raw/") == []


def test_an_object_that_is_replaced_after_it_was_hashed_is_refused(mix_of, server, tmp_path, monkeypatch):
    url = server.url("changing/a.jsonl")
    url.write_bytes(b'{"text": "some words"}\n' * 50)
    run_task = unit_task.run_task

    def replaced(task: Any) -> Any:
        url.write_bytes(b'{"text": "other words"}\n' * 50)
        return run_task(task)

    monkeypatch.setattr("llmt_prep.ingest.run_task", replaced)
    mix = mix_of("pretrain", tmp_path, path=str(url))
    with pytest.raises(DataError, match=r"s3://bucket/changing/a.jsonl: changed while it was read"):
        build(mix)
    monkeypatch.undo()
    assert build(mix).is_new


@pytest.mark.parametrize("kind", KINDS)
def test_what_became_of_a_record_is_shown_from_the_object(local, remote, kind):
    source = "one" if kind != "pretrain" else "web"
    for said in (f"{source}:3", f"{source}:17"):
        ours, theirs = (inspect_record(open_dataset(built[kind].path), said) for built in (remote, local))
        assert ours.place.startswith("s3://bucket/raw/")
        assert (ours.record, ours.texts, ours.left_out) == (theirs.record, theirs.texts, theirs.left_out)


def test_a_record_whose_object_is_gone_is_named(mix_of, server, tmp_path):
    url = server.url("going/a.jsonl")
    url.write_bytes(b'{"text": "some words"}\n' * 50)
    built = build(mix_of("pretrain", tmp_path, path=str(url)))
    url.unlink()
    with pytest.raises(DataError, match=r"s3://bucket/going/a.jsonl: cannot be read: no such object"):
        inspect_record(open_dataset(built.path), "a:0")


def test_a_plan_is_that_of_the_local_files(mix_of, corpus, server, tmp_path):
    ours, theirs = (
        dry_run(MixConfig.model_validate(mix_of("pretrain", tmp_path, root)), workers=1)
        for root in (server.url("raw"), corpus)
    )
    assert ours == theirs


def test_the_cache_is_explained_by_url(mix_of, server, tmp_path):
    url = server.url("explained/a.jsonl")
    url.write_bytes(b'{"text": "some words"}\n' * 50)
    config = MixConfig.model_validate(mix_of("pretrain", tmp_path, path=str(url)))
    build_dataset(config, workers=1)
    assert explain_cache(config, workers=1).sources["a"].to_tokenize.units == 0
    url.write_bytes(b'{"text": "other words"}\n' * 50)
    (reason, *_) = explain_cache(config, workers=1).sources["a"].reasons
    assert reason.why == ("content of s3://bucket/explained/a.jsonl changed",)


def test_an_error_of_a_record_names_the_url_and_its_line(mix_of, server, tmp_path):
    lines = [b'{"text": "some words that make the file longer"}\n'] * 60
    lines[41] = b'{"text": "<|endoftext|>"}\n'
    server.url("control/a.jsonl").write_bytes(b"".join(lines))
    mix = mix_of("pretrain", tmp_path, path="s3://bucket/control/a.jsonl")
    with pytest.raises(DataError, match=r"^s3://bucket/control/a.jsonl:42: the text holds the control string"):
        build(mix | {"special_tokens_in_text": "error"})
    lines[41] = b"{broken\n"
    server.url("control/b.jsonl").write_bytes(b"".join(lines))
    mix["sources"]["a"]["path"] = "s3://bucket/control/b.jsonl"
    with pytest.raises(DataError, match=r"s3://bucket/control/b.jsonl:42: not valid JSON"):
        build(mix | {"max_bad": 0})


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("s5://bucket/raw", r"mix.yaml:\d+: sources.a.path: found 's5://bucket/raw'; wanted a path, or a URL"),
        ("s3:///raw", r"sources.a.path: found 's3:///raw'; wanted s3://BUCKET/KEY"),
        ("s3://bucket/raw/*.csv", r"s3://bucket/raw/\*.csv: matches no file"),
        ("s3://elsewhere/raw", "s3://elsewhere/raw: no such bucket"),
        ("https://127.0.0.1:9/raw/*.jsonl", "a web server does not list its files"),
    ],
)
def test_a_url_that_cannot_work_is_one_message_of_the_command(mix_of, server, tmp_path, path, said):
    with (tmp_path / "mix.yaml").open("w") as file:
        YAML().dump(mix_of("pretrain", tmp_path, path=path), file)
    result = CliRunner().invoke(app, ["pack", "--mix", str(tmp_path / "mix.yaml")])
    assert getattr(result.exception, "exit_code", None) == 2
    assert re.search(said, str(result.exception))


def test_files_of_a_web_server_are_read_one_by_one(mix_of, local, corpus, tmp_path):
    names = ["web/a.jsonl", "web/b.jsonl", "web/c.jsonl.zst", "web/d.jsonl.gz"]
    with object_store.web_server(corpus) as url:
        mix = mix_of("pretrain", tmp_path, url)
        mix["sources"]["web"]["path"] = [f"{url}/{name}" for name in names]
        mix["sources"]["tables"]["path"] = [f"{url}/file.arrow", f"{url}/stream.arrow"]
        assert small_sources.differing(local["pretrain"].path, build(mix).path) <= OF_NAMES
        mix["sources"]["web"]["path"] = f"{url}/nothing.jsonl"
        with pytest.raises(ConfigError, match=r"http://.*/nothing.jsonl: no such object; mend `path:`"):
            build(mix)


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 2, marks=pytest.mark.slow),
    ],
)
def test_a_stop_leaves_no_copies(mix_of, remote, server, tmp_path, number, workers):
    (tmp_path / "temporary").mkdir()
    mix = mix_of("pretrain", tmp_path, server.url("raw"))
    with (tmp_path / "mix.yaml").open("w") as file:
        YAML().dump(mix, file)
    server.faults = object_store.Faults(stalled=1, stall=3, only="raw/file.arrow")
    environment = os.environ | object_store.environment(server) | {"TMPDIR": str(tmp_path / "temporary")}
    command = [
        sys.executable,
        "-m",
        "llmt_prep",
        "pack",
        "--mix",
        str(tmp_path / "mix.yaml"),
        "--workers",
        str(workers),
    ]
    process = subprocess.Popen(
        command, env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.PIPE
    )
    units, deadline = tmp_path / "cache" / "units", time.monotonic() + 90
    while not any(units.glob("*/[0-9a-f]*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, log = process.communicate()  # until its workers have ended too
    assert process.returncode == (4 if number == signal.SIGTERM else -signal.SIGKILL), log
    assert b"Traceback" not in log
    assert list((tmp_path / "temporary").iterdir()) == []
    server.faults = object_store.Faults()
    assert build(mix).digest == remote["pretrain"].digest


def test_a_file_url_is_a_path(corpus):
    mix = {"tokenizer": "x", "output": "out", "sequence": {"length": 8}, "sources": {"a": {"path": f"file://{corpus}"}}}
    assert MixConfig.model_validate(mix).sources["a"].path == (str(corpus),)
