"""Where a dataset grows: what a user keeps beside it stays, and a kill at any point leaves something to go on with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmt_prep import finish, pipeline, staging
from llmt_prep.config import MixConfig
from llmt_prep.pipeline import Built, build_dataset
from llmt_prep.verify import find_problems
from llmt_shared.dataset import open_dataset
from llmt_shared.errors import ConfigError, DataError, FormatError, Stopped

KILLED = """
import os, pathlib, shutil, sys
from llmt_prep.config import MixConfig
from llmt_prep.pipeline import build_dataset

calls, at = [], int(sys.argv[1])
def dying(function, counts):
    def call(path, *rest, **more):
        if counts(str(path)):
            calls.append(path)
            if len(calls) == at:
                os._exit(9)
        return function(path, *rest, **more)
    return call

of_publish = lambda path: path.endswith((".staging", ".staging/data", "/out/data", ".staging/recipe.json"))
pathlib.Path.rename = dying(pathlib.Path.rename, of_publish)
pathlib.Path.unlink = dying(pathlib.Path.unlink, of_publish)
shutil.rmtree = dying(shutil.rmtree, of_publish)
build_dataset(MixConfig.model_validate_json(sys.argv[2]), workers=1, force=True)
"""


def build(mix: dict[str, Any], **more: Any) -> Built:
    return build_dataset(MixConfig.model_validate(mix), **{"workers": 1, **more})


def kill_publishing(mix: dict[str, Any], at: int) -> None:
    """Build with force in a process that dies at a step of `publish`: two renames, the note, the rest."""
    text = MixConfig.model_validate(mix).model_dump_json(exclude_unset=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(at), text], env=environment, check=False)
    assert ended.returncode == 9


def leftovers(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir() if path.name not in (output.name, ".llmt-cache"))


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_kill_while_a_dataset_is_replaced_leaves_the_old_or_the_new_one(mix: dict[str, Any], at: int) -> None:
    output, old = Path(mix["output"]), build(mix).digest
    wanted = build(mix | {"seed": 8, "output": mix["output"] + "2", "cache": str(output.parent / ".llmt-cache")}).digest
    shutil.rmtree(mix["output"] + "2")
    kill_publishing(mix | {"seed": 8}, at)
    if at < 3:  # before the second rename
        with pytest.raises(ConfigError, match="--force to replace"):
            build(mix | {"seed": 8})
        assert open_dataset(output).digest == old
    assert build(mix | {"seed": 8}, force=at < 3).digest == wanted
    assert leftovers(output) == []


def test_a_published_dataset_that_is_deleted_is_made_again_in_full(mix: dict[str, Any]) -> None:
    first = build(mix).digest
    shutil.rmtree(mix["output"])
    kill_publishing(mix, 2)  # renamed, but its staging directory is still there
    shutil.rmtree(mix["output"])
    assert build(mix).digest == first


@pytest.mark.parametrize("name", ["data.old", "data.staging"])
def test_a_folder_of_the_users_is_never_removed(mix: dict[str, Any], name: str) -> None:
    mine = Path(mix["output"]).parent / name / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    if name.endswith(".staging"):
        with pytest.raises(ConfigError, match="move it away"):
            build(mix)
    else:
        build(mix)
        build(mix, force=True)
    assert mine.read_text() == "precious"


def test_a_file_of_the_users_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "data.lock").write_text("mine")
    with pytest.raises(ConfigError, match="no lock file"), staging.locked(tmp_path / "data"):
        pass
    assert (tmp_path / "data.lock").read_text() == "mine"


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "data.lock").write_text("process 1 on nowhere, since ever\n")
    with staging.locked(tmp_path / "data"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_as_output_is_followed(mix: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "out").mkdir()
    Path(mix["output"]).symlink_to(tmp_path / "big")
    first = build(mix)
    assert build(mix, force=True).digest == first.digest
    assert Path(mix["output"]).is_symlink()
    assert (tmp_path / "big" / "MANIFEST.json").exists()


def test_force_in_one_process_gives_what_a_fresh_one_gives(mix: dict[str, Any]) -> None:
    build(mix)
    replaced = build(mix | {"seed": 8}, force=True)
    assert replaced.digest == build(mix | {"seed": 8, "output": mix["output"] + "2"}).digest


@pytest.mark.parametrize("name", ["MANIFEST.json", "train/tokens/c/0/0"])
def test_a_damaged_dataset_is_named_and_replaced_by_force(mix: dict[str, Any], name: str) -> None:
    digest = build(mix).digest
    os.truncate(Path(mix["output"]) / name, 10)
    with pytest.raises(FormatError, match=r"damaged|truncated"):
        build(mix)
    assert build(mix, force=True).digest == digest


def test_a_run_that_fails_at_once_leaves_nothing(mix: dict[str, Any], tmp_path: Path) -> None:
    mix["sources"]["help"]["path"] = "no/such/file.jsonl"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="no/such"):
        build(mix | {"output": str(tmp_path / "a" / "b" / "data")})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_fails_on_its_input_leaves_its_cache_and_nothing_else(mix: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    mix["sources"]["bad"] = {"path": str(tmp_path / "bad.jsonl")}
    with pytest.raises(DataError, match="1 of 1 records"):
        build(mix)
    assert leftovers(Path(mix["output"])) == []


def stop_gathering(mix: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Build by force and stop when all shards are written."""

    def stop(*_: Any) -> None:
        raise Stopped("as asked")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.shards, "finish_split", stop)
        with pytest.raises(Stopped):
            build(mix, force=True)
    assert staging.staging_of(Path(mix["output"])).exists()


def test_a_stopped_force_is_gone_on_with_by_force(mix: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = build(mix | {"seed": 8, "output": mix["output"] + "2"}).digest
    old = build(mix).digest
    stop_gathering(mix | {"seed": 8}, monkeypatch)
    assert build(mix).digest == old
    stop_gathering(mix | {"seed": 8}, monkeypatch)
    assert build(mix | {"seed": 8}, force=True).digest == wanted


def test_a_stopped_force_that_is_not_wanted_any_more_leaves_nothing(
    mix: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(mix).digest
    for seed in (8, mix["seed"]):
        stop_gathering(mix | {"seed": seed}, monkeypatch)
        again = build(mix)
        assert (again.is_new, again.digest) == (False, old)
        assert leftovers(Path(mix["output"])) == []


def test_what_killed_processes_were_writing_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    directory, _ = staging.prepare(tmp_path / "out", "recipe")
    leftover = directory / "data" / "train" / "tokens" / "c" / "0" / "0.123.tmp"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    assert staging.prepare(tmp_path / "out", "recipe") == (directory, True)
    assert not leftover.exists()
    assert (directory / "recipe.json").exists()


def test_what_a_task_that_was_taken_for_lost_writes_to_the_end_is_no_part_of_the_dataset(
    mix: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may begin a file before the manifest is written, or after."""
    wanted = build(mix | {"output": mix["output"] + "-reference"}).digest
    late: list[Path] = []

    def leave(name: str, data: Path) -> None:
        late.append(data / "train" / "tokens" / "c" / "0" / f"{name}.elsewhere.1.tmp")
        late[-1].write_bytes(b"late")

    def written(data: Path, *more: Any, write: Any = finish.write_manifest) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # it begins right after others were removed
            leave("before", data)
            write(data, *more)
        leave("after", data)

    monkeypatch.setattr(finish, "write_manifest", written)
    built = build(mix)
    assert len(late) == 2
    assert list(built.path.rglob("*.tmp")) == []
    assert built.digest == wanted
    assert find_problems(built.path) == []
