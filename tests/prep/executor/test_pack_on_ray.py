"""Packing on a Ray cluster of two raylets: the bytes are those of this machine alone, whatever is lost on the way."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import small_tasks
from ray_cluster import MEMORY, kill_busy_node, node_of, running_cluster
from ruamel.yaml import YAML
from small_datasets import build_chats

from llmt_prep import ingest, pipeline, shards
from llmt_prep.config import MixConfig
from llmt_prep.pipeline import build_dataset, dry_run, explain_cache
from llmt_shared.dataset import open_dataset

pytest.importorskip("ray", reason="the extra `ray` is not installed")

MANY_TASKS = {"unit_size": 5000, "shard_size": 20_000}
COMMAND = [sys.executable, "-m", "llmt_prep", "pack", "--mix"]
PATIENT = "from llmt_prep.executor import dispatch; dispatch._GRACE = 60.0; from llmt_prep.cli import main; main()"
"""The command, but tasks have a minute to end: Ray may need seconds to pass on that they shall."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def on_ray(cluster: Any) -> dict[str, Any]:
    """Keys of a mix."""
    return {"executor": "ray", "ray": {"address": cluster.address, "memory": MEMORY}}


def apart(mix: dict[str, Any], name: str) -> dict[str, Any]:
    """The same mix with an output and a cache of their own."""
    folder = Path(mix["output"]).parent / name
    return mix | MANY_TASKS | {"output": str(folder / "data"), "cache": str(folder / "cache")}


def test_text_is_packed_to_the_same_bytes(mix: dict[str, Any], on_ray: dict[str, Any]) -> None:
    reference = build_dataset(MixConfig.model_validate(apart(mix, "local")), workers=1)
    built = build_dataset(MixConfig.model_validate(apart(mix, "ray") | on_ray))
    assert built.digest == reference.digest
    report = json.loads((built.path / "run.json").read_text())
    assert {key: report[key] for key in ("executor", "workers", "nodes", "cpus")} == {
        "executor": "ray", "workers": 2, "nodes": 2, "cpus": 2,
    }  # fmt: skip
    assert not build_dataset(MixConfig.model_validate(apart(mix, "ray") | on_ray)).is_new


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_chats_and_pairs_are_packed_to_the_same_bytes(tmp_path: Path, kind: str, on_ray: dict[str, Any]) -> None:
    one = build_chats(tmp_path, kind)
    cut = {"output": tmp_path / "cut", "cache": str(tmp_path / "cache"), "unit_size": 3000, "workers": None}
    assert open_dataset(build_chats(tmp_path, kind, **cut, **on_ray)).digest == open_dataset(one).digest


def test_plan_and_cache_are_told_the_same(mix: dict[str, Any], on_ray: dict[str, Any]) -> None:
    local, ray = (MixConfig.model_validate(apart(mix, "one") | more) for more in ({}, on_ray))
    assert dry_run(ray) == dry_run(local, workers=1)
    assert list(ray.output.parent.parent.glob("**/llmt-dry-run-*")) == []
    assert explain_cache(ray) == explain_cache(local, workers=1)


def test_a_node_that_is_lost_in_the_middle_changes_nothing(
    mix: dict[str, Any], cluster: Any, on_ray: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    reference = build_dataset(MixConfig.model_validate(apart(mix, "local")), workers=1)
    monkeypatch.setattr(ingest, "run_task", small_tasks.run_task_slowly)
    monkeypatch.setattr(shards, "write_shard", small_tasks.write_shard_slowly)
    for module in (ingest, pipeline):  # one while units are tokenized, one while shards are gathered
        monkeypatch.setattr(module, "stage", losing(cluster, module.stage, cluster.add_node(**node_of(2))))
    built = build_dataset(MixConfig.model_validate(apart(mix, "ray") | on_ray))
    assert built.digest == reference.digest
    assert len(cluster.worker_nodes) == 1  # both are lost
    assert "is done again, try 2 of 4" in capsys.readouterr().err


def losing(cluster: Any, stage: Callable[..., Any], node: Any) -> Callable[..., Any]:
    """A `stage` that kills a node after three results of it or more, while a task runs there."""

    @contextmanager
    def disturbed(name: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        seen = 0

        def advance(amount: int) -> None:
            nonlocal seen
            seen += 1
            if seen >= 3 and name != "check cache" and node in cluster.worker_nodes and kill_busy_node(node):
                cluster.remove_node(node, allow_graceful=False)

        with stage(name, total, unit):
            yield advance

    return disturbed


def run(mix: dict[str, Any], path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command where the mix lies."""
    command = [*COMMAND, str(written(mix, path)), *options]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)


def written(mix: dict[str, Any], path: Path) -> Path:
    with path.open("w") as file:
        YAML().dump(mix, file)
    return path


def message_of(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr[result.stderr.index("error: ") :]


def test_a_task_that_fails_is_told_as_on_one_machine(
    mix: dict[str, Any], tmp_path: Path, texts: list[str], on_ray: dict[str, Any]
) -> None:
    lines = [json.dumps({"text": text}) for text in [*texts[:40], "the end: <|endoftext|>"]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    mix |= {"sources": {"all": {"path": "a.jsonl"}}, "special_tokens_in_text": "error"}
    local = run(apart(mix, "local"), tmp_path / "local.yaml", "--workers", "2")
    ray = run(apart(mix, "ray") | on_ray, tmp_path / "ray.yaml", "--json")
    assert (local.returncode, local.stdout) == (ray.returncode, ray.stdout) == (1, "")
    assert "ray: 2 nodes, 2 CPUs" in ray.stderr
    assert "Traceback" not in ray.stderr
    assert message_of(local) == message_of(ray)
    assert message_of(ray).startswith("error: a.jsonl:41: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_ends_its_tasks_and_goes_on_later(
    mix: dict[str, Any], tmp_path: Path, texts: list[str], on_ray: dict[str, Any], number: signal.Signals
) -> None:
    many = [json.dumps({"text": f"{number} {text}"}) for number in range(4) for text in texts]
    (tmp_path / "many.jsonl").write_text("\n".join(many) + "\n")  # some seconds for the slow engine
    mix |= {"engine": "tokenizers", "sources": {"many": {"path": str(tmp_path / "many.jsonl")}}}
    reference = build_dataset(MixConfig.model_validate(apart(mix, "local") | {"engine": "auto"}), workers=1)
    mix = apart(mix, "ray") | on_ray | {"unit_size": 50_000}
    command = [sys.executable, "-c", PATIENT, *COMMAND[3:], str(written(mix, tmp_path / "mix.yaml"))]
    units = Path(mix["cache"]) / "units"
    stopped = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while stopped.poll() is None and len(list(units.glob("*/*"))) < 5:
        time.sleep(0.002)
    stopped.send_signal(number)
    _, log = stopped.communicate()
    if number == signal.SIGTERM:
        assert stopped.returncode == 4, log
        assert "stopped: by SIGTERM; nothing is lost: run the same command again" in log
        assert "Traceback" not in log
        assert list(units.glob("*/.*.tmp")) == []
    resumed = run(mix, tmp_path / "mix.yaml", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["digest"] == reference.digest
