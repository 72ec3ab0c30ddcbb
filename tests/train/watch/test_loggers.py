"""Every tool is told a run's metrics once, by the same names, in one run of its own, however often it was killed.

Weights & Biases and MLflow are stood in for by what Lightning's loggers do for them; where they are installed, a run is
logged by themselves too.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import loggers as lightning_loggers
from train.interrupted import interrupt
from train.tiny_dataset import WORDS, write_dataset

from llmt_shared.errors import ConfigError
from llmt_train import callbacks
from llmt_train.config import RunConfig
from llmt_train.fit import fit
from llmt_train.watch import loggers
from llmt_train.watch.metrics import read_metrics

INSTALLED = SimpleNamespace(origin="somewhere")
Told = list[tuple[int, dict[str, float]]]


class Server:
    """What a tool knows: by run, what it was told, the config, and how it ended."""

    def __init__(self) -> None:
        self.told: dict[str, Told] = {}
        self.configs: dict[str, list[dict[str, Any]]] = {}
        self.ends: list[Any] = []
        self.settings: list[dict[str, Any]] = []
        self.fails_at: int | None = None
        self.forgets = False
        """Whether it cannot say what it knows: W&B offline."""

    def steps(self, name: str) -> dict[str, list[int]]:
        """Steps at which each run was told a metric."""
        return {run: [step for step, values in told if name in values] for run, told in self.told.items()}


class Stub:
    """Both tools' loggers."""

    server: Server

    def __init__(self, **settings: Any) -> None:
        self.server.settings.append(settings)
        known = settings.get("id") or settings.get("run_id")
        self.run_id = known or f"run-{len(self.server.told)}"
        if settings.get("run_id") is not None and known not in self.server.told:
            raise RuntimeError(f"Run '{known}' not found\nand more lines")
        self.server.told.setdefault(self.run_id, [])
        self.experiment = SimpleNamespace(
            finish=self._finish,
            update_run=lambda run_id, status: None,
            summary={} if self.server.forgets else self._summary(),
            get_metric_history=self._history,
        )

    def _summary(self) -> dict[str, Any]:
        told = self.server.told[self.run_id]
        return {"trainer/global_step": told[-1][0]} if told else {}

    def _history(self, run_id: str, name: str) -> list[Any]:
        return [SimpleNamespace(step=step) for step in self.server.steps(name)[run_id]]

    def _finish(self, exit_code: int) -> None:
        self.server.ends.append(exit_code)

    def log_hyperparams(self, config: dict[str, Any]) -> None:
        self.server.configs.setdefault(self.run_id, []).append(config)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        if self.server.fails_at is not None and step >= self.server.fails_at:
            raise ConnectionError("the server has gone")
        self.server.told[self.run_id].append((step, values))

    def finalize(self, status: str) -> None:
        self.server.ends.append(status)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Server]:
    """Stubs of both tools, as if they were installed."""
    found = {"wandb": Server(), "mlflow": Server()}
    for name, kind in (("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")):
        monkeypatch.setattr(lightning_loggers, kind, type(kind, (Stub,), {"server": found[name]}))
    monkeypatch.setattr(loggers, "find_spec", lambda name: INSTALLED)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


def make_config(data: Path, output: Path, *log: str, **changes: Any) -> RunConfig:
    model = {
        "model_type": "llama", "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    settings = {
        "task": "pretrain", "model": {"from_config": model}, "data": data, "output": output, "batch": {"tokens": 32},
        "train": {"steps": 10}, "optim": {"lr": 1e-2}, "save": {"every": 3}, "eval": {"every": 4},
        "log": ["jsonl", *log],
    }  # fmt: skip
    return RunConfig.model_validate(settings | changes)


def fail_at(monkeypatch: pytest.MonkeyPatch, config: RunConfig, step: int, *, is_killed: bool = False) -> None:
    """Run until something raises right after a step was logged; with ``is_killed`` nothing is done after that."""
    log = callbacks.StepCallback._log

    def log_and_fail(self: Any, trainer: Any, number: int, record: Any) -> None:
        log(self, trainer, number, record)
        if number == step:
            if is_killed:
                patch.setattr(loggers.Loggers, "close", lambda *arguments: None)
                patch.setattr(loggers, "_write", lambda *arguments, is_open: None)
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.StepCallback, "_log", log_and_fail)
        with pytest.raises(ZeroDivisionError):
            fit(config)


def numbers(output: Path, key: str, name: str) -> list[tuple[int, float]]:
    """A metric's curve in metrics.jsonl."""
    found = []
    for record in read_metrics(output):
        values = record if key == "train" and "loss" in record else record.get(key, {})
        if name in values:
            found.append((record["step"], values[name]))
    return found


def test_every_tool_is_told_the_same_numbers_by_the_same_names(data, tmp_path, servers):
    fit(make_config(data, tmp_path / "run", "wandb", "mlflow"))
    (wandb,), (mlflow,) = (servers[name].told.values() for name in ("wandb", "mlflow"))
    assert wandb == mlflow
    for kind, name in (("train", "loss"), ("train", "lr"), ("train", "fill"), ("eval", "loss"), ("eval", "nll")):
        told = [(step, values[f"{kind}/{name}"]) for step, values in wandb if f"{kind}/{name}" in values]
        assert told == numbers(tmp_path / "run", kind, name)
        assert told
    last = read_metrics(tmp_path / "run")[-1]["eval"]["sources"]
    assert wandb[-1][1]["eval_by_source/web"] == last["web"]["loss"]
    assert all(isinstance(value, int | float) for _, values in wandb for value in values.values())


def test_every_tool_is_told_the_resolved_config(data, tmp_path, servers):
    config = make_config(data, tmp_path / "run", "wandb", "mlflow")
    fit(config)
    for server in servers.values():
        assert list(server.configs.values()) == [[config.model_dump(mode="json")]]


def test_the_sections_say_how(data, tmp_path, servers, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    wandb = {"project": "p", "entity": "e", "tags": ["a", "b"], "mode": "offline"}
    mlflow = {"experiment": "x", "name": "n"}
    fit(make_config(data, tmp_path / "run", "wandb", "mlflow", wandb=wandb, mlflow=mlflow))
    (found,) = servers["wandb"].settings
    assert {key: found[key] for key in ("project", "entity", "tags", "mode", "name", "save_dir")} == {
        "project": "p", "entity": "e", "tags": ("a", "b"), "mode": "offline", "name": "run",
        "save_dir": tmp_path / "run",
    }  # fmt: skip
    (found,) = servers["mlflow"].settings
    assert (found["experiment_name"], found["run_name"]) == ("x", "n")
    assert found["tracking_uri"] == (tmp_path / "run" / "mlflow").as_uri()
    assert found["synchronous"] is None


@pytest.mark.parametrize(
    ("given", "variable", "wanted"),
    [("http://a", "http://b", "http://a"), (None, "http://b", "http://b"), ("file:/c", None, "file:/c")],
)
def test_the_tracking_server_is_the_configs_or_the_environments(
    data, tmp_path, servers, monkeypatch, given, variable, wanted
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable or "")
    fit(make_config(data, tmp_path / "run", "mlflow", mlflow={"tracking_uri": given}, train={"steps": 1}))
    (found,) = servers["mlflow"].settings
    assert found["tracking_uri"] == wanted
    assert found["synchronous"] is (None if wanted.startswith("file:") else False)  # training waits for no server


@pytest.mark.parametrize("is_killed", [True, False])
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_resumed_run_is_told_on_in_the_same_run_and_every_step_once(
    data, tmp_path, servers, monkeypatch, name, is_killed
):
    config = make_config(data, tmp_path / "run", name)
    fail_at(monkeypatch, config, 2, is_killed=is_killed)  # before the first checkpoint
    fail_at(monkeypatch, config, 8, is_killed=is_killed)  # from 0, saved at 6
    fail_at(monkeypatch, config, 7, is_killed=is_killed)  # within what the tool knows already
    assert fit(config).resumed_from == 6
    (told,), (evaluated,) = (servers[name].steps(f"{kind}/loss").values() for kind in ("train", "eval"))
    # Of the last step before a kill W&B may have a part: it is told again.
    again = [2, 8] if name == "wandb" and is_killed else []
    assert (told, evaluated) == (sorted([*range(1, 11), *again]), [0, 4, 8, 10])


def test_where_wandb_cannot_say_what_it_knows_it_is_told_again(data, tmp_path, servers, monkeypatch):
    servers["wandb"].forgets = True
    config = make_config(data, tmp_path / "run", "wandb")
    fail_at(monkeypatch, config, 8, is_killed=True)  # saved at 6
    fit(config)
    assert list(servers["wandb"].steps("train/loss").values()) == [[1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9, 10]]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tool_that_comes_later_is_told_from_there(data, tmp_path, servers, monkeypatch, name):
    fail_at(monkeypatch, make_config(data, tmp_path / "run"), 5)  # saved at 3
    fail_at(monkeypatch, make_config(data, tmp_path / "run", name), 7)  # from 3, saved at 6
    fail_at(monkeypatch, make_config(data, tmp_path / "run"), 8)  # the tool is not there
    fit(make_config(data, tmp_path / "run", name))
    assert list(servers[name].steps("train/loss").values()) == [[4, 5, 6, 7, 8, 9, 10]]


def test_force_begins_new_runs(data, tmp_path, servers):
    config = make_config(data, tmp_path / "run", "wandb", "mlflow")
    fit(config)
    fit(config, force=True)
    for server in servers.values():
        assert list(server.steps("train/loss").values()) == [list(range(1, 11))] * 2


def test_the_config_of_a_longer_run_is_told_where_a_tool_takes_it(data, tmp_path, servers):
    """MLflow's parameters can never be changed."""
    settings = {"optim": {"lr": 1e-2, "schedule": "constant"}}
    for steps in (4, 6):
        fit(make_config(data, tmp_path / "run", "wandb", "mlflow", train={"steps": steps}, **settings))
    told = {name: [[each["train"]["steps"] for each in configs] for configs in server.configs.values()]
            for name, server in servers.items()}  # fmt: skip
    assert told == {"wandb": [[4, 6]], "mlflow": [[4]]}


def test_a_run_ends_well_in_every_tool_or_does_not(data, tmp_path, servers, monkeypatch):
    config = make_config(data, tmp_path / "run", "wandb", "mlflow")
    fail_at(monkeypatch, config, 4)
    fit(config)
    assert servers["wandb"].ends == ["failed", 1, "success", 0]
    assert servers["mlflow"].ends == ["failed", "success"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tool_that_fails_ends_no_run_and_is_named_once(data, tmp_path, servers, capsys, name):
    servers[name].fails_at = 3
    assert fit(make_config(data, tmp_path / "run", name)).steps == 10
    err = capsys.readouterr().err
    assert err.count(f"warning: {name}: the server has gone; it is told nothing more") == 1
    assert list(servers[name].steps("train/loss").values()) == [[1, 2]]


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["nothing", "a folder of that name"])
@pytest.mark.parametrize(
    ("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny"), ("tensorboard", "tensorboard")]
)
def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    data, tmp_path, monkeypatch, name, package, found
):
    monkeypatch.setattr(loggers, "find_spec", lambda each: found if each == name else INSTALLED)
    config = make_config(data, tmp_path / "run", name, model="/no/such/model")
    with pytest.raises(ConfigError, match=f"log: {name}: .* not installed; run: pip install {package}, or"):
        fit(config)
    assert not (tmp_path / "run").exists()


def test_a_tool_that_does_not_know_the_run_any_more_is_an_error_at_start(data, tmp_path, servers):
    config = make_config(data, tmp_path / "run", "mlflow", train={"steps": 2})
    fit(config)
    servers["mlflow"].told.clear()
    config = make_config(data, tmp_path / "run", "mlflow", train={"steps": 3})
    with pytest.raises(ConfigError, match="log: mlflow: Run 'run-0' not found; wanted a server or folder"):
        fit(config)


def test_what_stands_in_loggers_json_must_be_readable(data, tmp_path, servers):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "loggers.json").write_text("{")
    with pytest.raises(ConfigError, match=r"loggers\.json: .*remove it to begin new ones"):
        fit(make_config(data, tmp_path / "run", "wandb"))


def test_tensorboard_has_the_curve_of_a_killed_run_and_the_config(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(data, tmp_path / "run", "tensorboard")
    interrupt(config, 8)
    time.sleep(1.1)  # TensorBoard tells which of two files is newer by whole seconds
    fit(config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 4, 8, 10]
    assert "lr: 0.01" in (tmp_path / "run" / "tensorboard" / "hparams.yaml").read_text()


def needs(package: str) -> Callable[[Any], Any]:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@needs("wandb")
def test_weights_and_biases_has_the_curve_of_a_killed_run(data, tmp_path, monkeypatch):
    """Offline; read back from the files that `wandb sync` would send, start after start."""
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_SILENT", "true")
    config = make_config(data, tmp_path / "run", "wandb", wandb={"mode": "offline"})
    interrupt(config, 8)
    fit(config)
    starts = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))  # their names begin with the time
    told = []
    for path in starts:
        for content in leveldb_records(path.read_bytes()[7:]):
            record = wandb_internal_pb2.Record.FromString(content)
            values = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "train/loss" in values:
                told.append((json.loads(values["trainer/global_step"]), json.loads(values["train/loss"])))
    assert len(starts) == 2
    assert len({path.name for path in starts}) == 1  # one run
    # What W&B had not yet written when it was killed is lost; nothing that a checkpoint did not hold may be.
    assert [number for number in numbers(tmp_path / "run", "train", "loss") if number[0] > 6] == told[-4:]


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a log as LevelDB writes it: blocks of 32 KiB, the first of which here lacks 7 bytes."""
    place, begun = 0, b""
    while place < len(log):
        left = 32768 - (place + 7) % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        begun += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield begun
            begun = b""


@needs("mlflow")
def test_mlflow_has_the_curve_of_a_killed_run(data, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = make_config(data, tmp_path / "run", "mlflow")
    interrupt(config, 8)
    fit(config)
    from mlflow import MlflowClient

    client = MlflowClient((tmp_path / "run" / "mlflow").as_uri())
    (experiment,) = [each for each in client.search_experiments() if each.name == "llmt"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert (run.data.params["train/steps"], run.data.params["optim/lr"]) == ("10", "0.01")
    for name in ("train/loss", "eval/loss"):
        told = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        assert told == numbers(tmp_path / "run", *name.split("/"))
    assert math.isfinite(run.data.metrics["eval_by_source/code"])
