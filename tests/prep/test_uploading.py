"""A store gets the dataset that a disk gets, and a stop at any moment leaves what the same mix goes on with."""

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

from llmt_prep import pipeline, shards, uploading
from llmt_prep.cli import app
from llmt_prep.config import MixConfig
from llmt_prep.pipeline import Built, build_dataset, dry_run, explain_cache
from llmt_prep.uploading import upload
from llmt_prep.verify import find_problems
from llmt_shared import objects
from llmt_shared.dataset import open_dataset
from llmt_shared.errors import ConfigError, FormatError, Stopped, StoreError
from llmt_shared.objects import ObjectPath

pytestmark = pytest.mark.usefixtures("without_faults")

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sources.write(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(autouse=True)
def _at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a working directory of its own, which is where the work of an output in a store lies."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def url(server: object_store.Server, tmp_path: Path) -> ObjectPath:
    return server.url(f"out/{tmp_path.name}")


@pytest.fixture
def mix(corpus: Path, shared_cache: Path, url: ObjectPath) -> dict[str, Any]:
    return small_sources.mix(shared_cache, corpus, corpus, output=str(url))


def build(mix: dict[str, Any], **more: Any) -> Built:
    return build_dataset(MixConfig.model_validate(mix), **{"workers": 1, **more})


@pytest.fixture(scope="module")
def local(corpus: Path, shared_cache: Path) -> Built:
    return build(small_sources.mix(shared_cache, corpus, corpus))


def names_below(url: ObjectPath) -> list[str]:
    return [each.path.url.removeprefix(f"{url}/") for each in url.files()]


def downloaded(url: ObjectPath, folder: Path) -> Path:
    for name in names_below(url):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((url / name).read_bytes())
    return folder


def test_a_store_gets_the_dataset_of_the_disk(mix, url, local, tmp_path):
    built = build(mix)
    assert (built.path, built.digest, built.is_new) == (url, local.digest, True)
    assert small_sources.differing(local.path, downloaded(url, tmp_path / "copy")) == {"run.json"}
    assert find_problems(url) == []
    assert list(Path().iterdir()) == []  # what building it needed here is gone


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_chats_and_pairs_too(corpus, shared_cache, url, kind):
    mix = small_sources.mix(shared_cache, corpus, corpus, **small_sources.chats(kind, corpus))
    wanted = build(mix | {"output": str(shared_cache / kind)}).digest
    assert build(mix | {"output": str(url)}, workers=2).digest == wanted


def test_the_same_mix_again_finds_it_there(mix, url):
    first = build(mix)
    (url / uploading.NOTE).write_bytes(b"{}")  # as a kill just before its removal leaves it
    again = build(mix)
    assert (again.is_new, again.digest) == (False, first.digest)
    assert uploading.NOTE not in names_below(url)


def test_chunks_do_not_gather_on_this_disk(mix, monkeypatch):
    seen = []
    really = shards.write_shard

    def watched(task: Any, shard: int) -> None:
        really(task, shard)
        seen.append(list(Path().rglob("tokens/c/*")))

    monkeypatch.setattr(shards, "write_shard", watched)
    build(mix)
    assert len(seen) > 3
    assert not any(seen)


def test_the_cache_is_in_the_working_directory_where_none_is_named(mix):
    del mix["cache"]
    build(mix)
    assert [path.name for path in Path().iterdir()] == [".llmt-cache"]


def test_sources_and_output_may_both_be_in_a_store(corpus, server, url, shared_cache):
    raw = object_store.upload(server, corpus, "raw-and-out")
    mix = small_sources.mix(shared_cache, corpus, raw)
    wanted = build(mix | {"output": str(shared_cache / "from-store")}).digest
    assert build(mix | {"output": str(url)}).digest == wanted


def test_faults_that_pass_change_nothing(mix, local, server):
    server.met.clear()
    server.faults = object_store.Faults(error=0.1, truncated=0.1, flipped=0.1, stalled=0.05, stall=0.5)
    assert build(mix).digest == local.digest
    assert server.met["error"] > 2
    assert server.met["stalled"] > 0


def test_faults_that_stay_end_the_run_and_it_goes_on_later(mix, url, local, server, monkeypatch):
    monkeypatch.setattr(objects, "PATIENCE", 0.3)
    server.faults = object_store.Faults(error=1, only="tokens/c/2/")
    with pytest.raises(StoreError, match=r"train/tokens/c/2/0: no right answer.*run the same command again") as error:
        build(mix)
    assert error.value.exit_code == 1
    assert "MANIFEST.json" not in names_below(url)
    server.faults = object_store.Faults()
    server.seen.clear()
    assert build(mix).digest == local.digest
    assert [path for method, path, _ in server.seen if method == "PUT" and "train/tokens/c/0/" in path] == []


KILLED = """
import os, sys
from llmt_prep.config import MixConfig
from llmt_prep.pipeline import build_dataset
from llmt_shared.objects import ObjectPath

calls, at, step = [], int(sys.argv[1]), sys.argv[2]
def dying(function):
    def call(*arguments, **more):
        calls.append(1)
        if len(calls) == at and step == "before":
            os._exit(9)
        result = function(*arguments, **more)
        if len(calls) == at:
            os._exit(9)
        return result
    return call

for name in ("upload", "write_bytes", "unlink"):
    setattr(ObjectPath, name, dying(getattr(ObjectPath, name)))
build_dataset(MixConfig.model_validate_json(sys.argv[3]), workers=1)
"""


def kill(mix: dict[str, Any], server: object_store.Server, at: int, step: str) -> int:
    """Build in a process that dies at so many uploads."""
    text = MixConfig.model_validate(mix).model_dump_json(exclude_unset=True)
    environment = os.environ | object_store.environment(server) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(at), step, text], env=environment, check=False, timeout=120
    ).returncode


@pytest.mark.parametrize("places", [(5, -1), pytest.param((1, 2, -4, 0), marks=pytest.mark.slow)])
def test_a_kill_at_any_upload_is_gone_on_after(mix, url, local, server, tmp_path, places):
    num_uploads = len(local.manifest.files) + 4  # with note, manifest, run.json, and the note's removal
    for at in (place if place > 0 else num_uploads + place for place in places):
        assert kill(mix, server, at, "after" if at % 2 else "before") == 9
        is_finished = "MANIFEST.json" in names_below(url)
        assert not is_finished or find_problems(url) == [] or uploading.NOTE in names_below(url)
        os.chdir(tmp_path if at == 5 else tmp_path / "work")  # once on "another machine": nothing of the work is here
        assert build(mix).digest == local.digest
        assert find_problems(url) == []
        for each in list(url.files()):
            each.path.unlink()


def test_a_kill_in_the_middle_of_gathering_costs_only_time(mix, url, local, server, tmp_path):
    with (tmp_path / "mix.yaml").open("w") as file:
        YAML().dump(mix, file)
    server.faults = object_store.Faults(stalled=1, stall=3, only="tokens/c/3")
    environment = os.environ | object_store.environment(server) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "llmt_prep", "pack", "--mix", str(tmp_path / "mix.yaml"), "--workers", "2"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while not any("tokens/c/1/" in name for name in names_below(url)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # until its workers have ended too
    assert process.returncode == -signal.SIGKILL
    assert "MANIFEST.json" not in names_below(url)
    server.faults = object_store.Faults()
    assert build(mix).digest == local.digest


def test_a_shard_that_another_attempt_has_uploaded_is_done(url, server, tmp_path):
    shards._move(tmp_path / "gone", url)
    assert not url.exists()
    (tmp_path / "chunk").write_bytes(b"tokens")
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        shards._move(tmp_path / "chunk", ObjectPath("s3://elsewhere/chunk"))
    assert (tmp_path / "chunk").exists()


def stop_gathering(mix: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise Stopped("as asked")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.shards, "finish_split", stop)
        with pytest.raises(Stopped):
            build(mix)


def test_an_unfinished_dataset_of_another_mix_is_left_alone(mix, url, monkeypatch):
    stop_gathering(mix, monkeypatch)
    before = names_below(url)
    said = r"holds an unfinished dataset made from another mix.*by process \d+ on .*remove all objects below it"
    for force in (False, True):
        with pytest.raises(ConfigError, match=said):
            build(mix | {"seed": 8}, force=force)
    assert names_below(url) == before


def test_a_shard_that_was_lost_or_cut_short_is_made_again(mix, url, local, monkeypatch):
    stop_gathering(mix, monkeypatch)
    (url / "train/tokens/c/0/0").unlink()
    (url / "train/tokens/c/1/0").write_bytes(b"short")
    assert build(mix).digest == local.digest
    assert find_problems(url) == []


def test_a_shard_that_is_lost_at_the_end_keeps_the_manifest_away(mix, url, local, monkeypatch):
    really = uploading.wrong_files

    def lost(output: Any, manifest: Any) -> Any:
        (url / "train/tokens/c/0/0").unlink()
        return really(output, manifest)

    monkeypatch.setattr(uploading, "wrong_files", lost)
    with pytest.raises(StoreError, match=r"train/tokens/c/0/0: missing.*run the same command again"):
        build(mix)
    assert "MANIFEST.json" not in names_below(url)
    monkeypatch.undo()
    assert build(mix).digest == local.digest


def test_a_finished_dataset_is_not_replaced(mix, url):
    digest = build(mix).digest
    with pytest.raises(ConfigError, match=r"finished dataset made from another mix.*remove all objects below it"):
        build(mix | {"seed": 8})
    for seed in (3, 8):
        with pytest.raises(ConfigError, match=r"--force replaces none in a store; choose another `output`, or remove"):
            build(mix | {"seed": seed}, force=True)
    assert open_dataset(url).digest == digest


def test_a_damaged_dataset_is_named(mix, url):
    build(mix)
    (url / "train/row_targets/c/0").write_bytes(b"short")
    with pytest.raises(FormatError, match=r"row_targets/c/0: truncated.*remove all objects below it first"):
        build(mix)


@pytest.mark.parametrize("name", ["mine.txt", "deep/mine.txt"])
def test_what_a_user_keeps_there_stays(mix, url, name):
    (url / name).write_bytes(b"precious")
    for force in (False, True):
        with pytest.raises(
            ConfigError, match=rf"holds {url / name}, and is no dataset; wanted a URL with nothing below"
        ):
            build(mix, force=force)
    assert names_below(url) == [name]


def test_a_source_below_the_output_is_refused(mix, url):
    (url / "raw.jsonl").write_bytes(b'{"text": "some words"}\n')
    (url / uploading.NOTE).write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"raw.jsonl: would be packed, but is packing's own"):
        build(mix | {"sources": {"a": {"path": f"{url}/*.jsonl"}}})


def test_a_note_that_is_not_ours_is_named(mix, url):
    (url / uploading.NOTE).write_bytes(b"[]")
    with pytest.raises(ConfigError, match=r"PACKING.json: not written by llmt-prep"):
        build(mix)


def test_of_two_claims_only_one_recipe_has_it(url):
    uploading.claim(url, "one")
    uploading.claim(url, "one")
    with pytest.raises(ConfigError, match="unfinished dataset made from another mix"):
        uploading.claim(url, "two")
    assert json.loads((url / uploading.NOTE).read_bytes())["recipe"] == "one"


def test_two_outputs_of_one_name_do_not_share_their_work(mix, url, local, server, monkeypatch):
    stop_gathering(mix, monkeypatch)
    assert build(mix | {"output": str(server.url(f"elsewhere/{url.name}"))}).digest == local.digest
    assert build(mix).digest == local.digest


def test_planning_and_explaining_ask_the_store_nothing(mix, server, url):
    config = MixConfig.model_validate(mix)
    server.seen.clear()
    assert dry_run(config, workers=1).splits
    assert explain_cache(config, workers=1).sources
    assert server.seen == []


def test_a_bit_that_flips_on_its_way_up_is_sent_again(server, url, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(os.urandom(100_000))
    really, flips = object_store._Handler._pass_on, [3]
    monkeypatch.setattr(object_store._Handler, "do_PUT", lambda self: _flipping(self, really, flips))
    upload(tmp_path / "file", url)
    assert flips == [0]
    assert url.read_bytes() == (tmp_path / "file").read_bytes()
    flips[0] = 1000
    with pytest.raises(StoreError, match="arrived otherwise than it was sent, each of 4 times"):
        upload(tmp_path / "file", url)


def _flipping(handler: Any, really: Callable[..., None], flips: list[int]) -> None:
    stream, is_flipped = handler.rfile, flips[0] > 0
    flips[0] -= is_flipped  # before the answer: the test looks as soon as that is there

    class Flipped:
        def read(self, size: int) -> bytes:
            content = stream.read(size)
            return bytes([content[0] ^ 1]) + content[1:] if content and is_flipped else content

    handler.rfile = Flipped()
    try:
        really(handler)
    finally:
        handler.rfile = stream


@pytest.mark.parametrize("size", [0, 1, 5 << 20, (5 << 20) + 1, 11 << 20])
def test_the_etag_of_parts_is_foreseen(url, tmp_path, monkeypatch, size):
    monkeypatch.setattr(objects, "PART", 5 << 20)
    monkeypatch.setattr(uploading, "PART", 5 << 20)
    monkeypatch.setattr(uploading, "_is_there", lambda *_: False)
    (tmp_path / "file").write_bytes(os.urandom(size))
    upload(tmp_path / "file", url)
    assert url.stat().st_size == size


def test_an_etag_that_is_no_md5_is_answered_by_reading_back(url, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")
    monkeypatch.setattr(uploading, "_etag", lambda _: "of an encrypted object")
    upload(tmp_path / "file", url)
    assert url.read_bytes() == b"content"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("s5://bucket/out", r"mix.yaml:\d+: output: found 's5://bucket/out'; wanted a path, or a URL"),
        ("s3://", r"output: found 's3://'; wanted s3://BUCKET/KEY"),
        ("https://host/out", r"output: found 'https://host/out'; a web server takes no datasets"),
        (17, "output: found 17; wanted a path or URL"),
        ("s3://elsewhere/out", "s3://elsewhere/out: no such bucket"),
    ],
)
def test_an_output_that_cannot_work_is_one_message_of_the_command(corpus, tmp_path, output, said):
    with (tmp_path / "mix.yaml").open("w") as file:
        YAML().dump(small_sources.mix(tmp_path, corpus, corpus, output=output), file)
    result = CliRunner().invoke(app, ["pack", "--mix", str(tmp_path / "mix.yaml")])
    assert getattr(result.exception, "exit_code", None) == 2
    assert re.search(said, str(result.exception))
    assert list(Path().iterdir()) == []


def test_wrong_credentials_are_one_message(mix, server):
    server.faults = object_store.Faults(refused=1)
    with pytest.raises(ConfigError, match=r"s3://bucket/out/.*: the store refuses access: .*AWS_SECRET_ACCESS_KEY"):
        build(mix)


def test_a_file_url_is_a_path(mix, local, tmp_path):
    assert build(mix | {"output": f"file://{tmp_path}/data"}).path == tmp_path / "data"
    assert open_dataset(tmp_path / "data").digest == local.digest
