"""What happens around a step: what is written down of it, what is due after it, and in which order."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train.interrupted import curve, interrupt
from train.tiny_dataset import WORDS, write_dataset

from llmt_shared.dataset import open_dataset
from llmt_shared.errors import Stopped
from llmt_train import callbacks, checkpoints
from llmt_train.config import RunConfig
from llmt_train.data.stream import rows_of_step
from llmt_train.fit import fit
from llmt_train.setup import open_data
from llmt_train.watch import step_record
from llmt_train.watch.metrics import read_metrics

LLAMA = {
    "model_type": "llama", "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


def make_config(data: Path, output: Path, **changes: Any) -> RunConfig:
    settings = {
        "task": "pretrain", "model": {"from_config": LLAMA}, "data": data, "output": output,
        "batch": {"tokens": 5 * 16, "micro_rows": 2}, "train": {"steps": 12, "seed": 3}, "optim": {"lr": 1e-2},
        "eval": {"every": 2}, "save": {"every": 2, "keep": 1, "keep_best": 2},
    }  # fmt: skip
    return RunConfig.model_validate(settings | changes)


def steps(output: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(output) if "loss" in record]


def held_out(output: Path) -> dict[int, float]:
    return {record["step"]: record["eval"]["loss"] for record in read_metrics(output) if "eval" in record}


def kept(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").iterdir())


def test_a_step_says_what_it_took(data, tmp_path):
    fit(make_config(data, tmp_path / "run", train={"epochs": 0.9, "seed": 3}))  # the last step is short
    records = steps(tmp_path / "run")
    assert list(records[0]) == [
        "step", "epoch", "loss", "lr", "grad_norm", "nll", "perplexity", "tokens", "rows", "tokens_per_s", "tflops",
        "fill", "data_wait", "peak_memory",
    ]  # fmt: skip
    assert [record["tokens"] for record in records] == [16 * record["rows"] for record in records]
    assert records[-1]["rows"] == 22
    assert all(0 <= record["data_wait"] <= 1 and record["peak_memory"] > 1e6 for record in records)


def test_the_fill_of_a_step_is_that_of_its_rows(data, tmp_path):
    config = make_config(data, tmp_path / "run", train={"epochs": 0.9, "seed": 3})
    fit(config)
    _, plan = open_data(config)
    split = open_dataset(data).train
    for step, record in enumerate(steps(tmp_path / "run")):
        rows = rows_of_step(plan, step)
        assert record["fill"] == split.segments(rows).length.sum() / (len(rows) * 16)


def test_the_time_of_evaluating_and_saving_is_no_steps(data, tmp_path, monkeypatch):
    evaluate, write = callbacks.evaluate, checkpoints.Saver.save
    late = [0.0]
    monkeypatch.setattr(step_record, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late[0]))

    def slow(function):
        def called(*arguments: Any, **options: Any) -> Any:
            late[0] += 1000
            return function(*arguments, **options)

        return called

    monkeypatch.setattr(callbacks, "evaluate", slow(evaluate))
    monkeypatch.setattr(checkpoints.Saver, "save", slow(write))
    fit(make_config(data, tmp_path / "run", train={"steps": 5, "seed": 3}))
    assert all(record["tokens_per_s"] > 80 / 1000 for record in steps(tmp_path / "run"))


def test_a_request_to_stop_is_heard_while_it_evaluates(data, tmp_path, monkeypatch):
    evaluate = callbacks.evaluate

    def evaluate_and_ask(module, *rest):
        if module.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(module, *rest)

    monkeypatch.setattr(callbacks, "evaluate", evaluate_and_ask)
    with pytest.raises(Stopped, match="saved at step 4"):
        fit(make_config(data, tmp_path / "run", save={"every": 100}))


def test_a_checkpoint_knows_its_held_out_loss(data, tmp_path):
    fit(make_config(data, tmp_path / "run", save={"every": 2, "keep": 9}))
    losses = held_out(tmp_path / "run")
    for step in (2, 4, 6, 8, 10, 12):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        assert checkpoints.read_state(folder).eval_loss == losses[step]


def test_one_of_a_stopped_step_has_none(data, tmp_path):
    interrupt(make_config(data, tmp_path / "run", eval={"every": 100}, save={"every": 100}), 3, signal.SIGTERM)
    assert checkpoints.read_state(checkpoints.find_checkpoint(tmp_path / "run")).eval_loss is None


OVERFITTING = {"optim": {"lr": 0.3, "schedule": "constant", "clip": None}, "train": {"steps": 12, "seed": 3}}
"""The held-out loss falls and rises."""


def test_the_best_checkpoints_stay_and_the_result_names_the_best(data, tmp_path):
    result = fit(make_config(data, tmp_path / "run", **OVERFITTING))
    losses = {step: loss for step, loss in held_out(tmp_path / "run").items() if step}
    best = sorted(losses, key=lambda step: losses[step])[:2]
    assert best != [12, 10]  # else it would be no test
    assert kept(tmp_path / "run") == sorted({*best, 12})
    assert (result.best, result.best_eval_loss) == (
        str(tmp_path / "run" / "checkpoints" / f"step-{best[0]:08d}"), losses[best[0]],
    )  # fmt: skip


def test_a_killed_run_keeps_the_checkpoints_of_a_whole_one(data, tmp_path):
    whole = fit(make_config(data, tmp_path / "whole", **OVERFITTING))
    config = make_config(data, tmp_path / "run", **OVERFITTING)
    interrupt(config, 5)
    interrupt(config, 9)
    result = fit(config)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert kept(tmp_path / "run") == kept(tmp_path / "whole")
    assert result.best_eval_loss == whole.best_eval_loss


def test_without_keep_best_none_is_named(data, tmp_path):
    result = fit(make_config(data, tmp_path / "run", save={"every": 2, "keep": 3}))
    assert (result.best, result.best_eval_loss) == (None, None)
    assert kept(tmp_path / "run") == [8, 10, 12]
