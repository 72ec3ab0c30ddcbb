"""Whole runs on tiny models: they learn, resume bit for bit, and refuse what cannot work before the first step."""

import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from train import tiny_dataset
from train.interrupted import curve, interrupt
from train.saved import saved_tensors
from train.tiny_dataset import WORDS, write_dataset

from llmt_shared.dataset import Split
from llmt_shared.errors import ConfigError, DataError, FormatError, LlmtError, Stopped
from llmt_train import checkpoints
from llmt_train.config import RunConfig
from llmt_train.fit import fit
from llmt_train.watch.metrics import read_metrics

LLAMA = {
    "model_type": "llama", "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
GPT2_WITH_DROPOUT = {
    "model_type": "gpt2", "vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
    "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


def make_config(data: Path, output: Path, model: Any = None, **changes: Any) -> RunConfig:
    settings = {
        "task": "pretrain",
        "model": {"from_config": LLAMA} if model is None else model,
        "data": data,
        "output": output,
        "batch": {"tokens": 5 * 16, "micro_rows": 2},
        "train": {"steps": 12, "seed": 3},
        "optim": {"lr": 1e-2, "warmup": "20%"},
        "eval": {"every": 4},
        "save": {"every": 3, "keep": 2},
    }
    return RunConfig.model_validate(settings | changes)


def test_a_run_learns_and_leaves_what_it_promises(data: Path, tmp_path: Path) -> None:
    result = fit(make_config(data, tmp_path / "run"))
    records = read_metrics(tmp_path / "run")
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert [record["step"] for record in evaluations] == [0, 4, 8, 12]
    assert steps[0]["loss"] == pytest.approx(math.log(WORDS), rel=0.05)
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert evaluations[-1]["eval"]["loss"] < 0.9 * evaluations[0]["eval"]["loss"]
    assert (result.loss, result.eval_loss) == (steps[-1]["loss"], evaluations[-1]["eval"]["loss"])
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000009", "step-00000012"]
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").exists()


def test_a_checkpoint_loads_with_weights_only_and_plain_containers(data: Path, tmp_path: Path) -> None:
    folder = Path(fit(make_config(data, tmp_path / "run", train={"steps": 1})).checkpoint)
    content = torch.load(folder / checkpoints.TRAINER, weights_only=True)
    assert {"optimizers", "lr_schedulers", "loops"} <= content.keys()
    assert RunConfig.model_validate(checkpoints.read_config(folder)).train.steps == 1


def test_the_evaluation_is_the_mean_over_all_targets(data: Path, tmp_path: Path) -> None:
    fit(make_config(data, tmp_path / "run", train={"steps": 1}))
    result = read_metrics(tmp_path / "run")[0]["eval"]
    sources = result["sources"].values()
    assert result["targets"] == sum(source["targets"] for source in sources) == _targets(data)
    weighted = sum(source["loss"] * source["targets"] for source in sources) / result["targets"]
    assert result["loss"] == pytest.approx(weighted, rel=1e-12)


def _targets(data: Path) -> int:
    return json.loads((data / "MANIFEST.json").read_text())["splits"]["validation"]["targets"]


def test_the_number_of_rows_in_a_micro_batch_changes_nothing_but_rounding(data: Path, tmp_path: Path) -> None:
    for micro_rows in (1, 5):
        fit(make_config(data, tmp_path / str(micro_rows), batch={"tokens": 80, "micro_rows": micro_rows}))
    one, five = ([r["loss"] for r in read_metrics(tmp_path / str(rows)) if "loss" in r] for rows in (1, 5))
    assert one == pytest.approx(five, rel=2e-5)


@pytest.mark.parametrize("model", [LLAMA, GPT2_WITH_DROPOUT], ids=["llama", "gpt2 with dropout"])
def test_a_run_killed_again_and_again_has_the_uninterrupted_curve(data: Path, tmp_path: Path, model: dict) -> None:
    settings = {"model": {"from_config": model}, "train": {"epochs": 2.6, "seed": 3}}  # the last step is short
    fit(make_config(data, tmp_path / "whole", **settings))
    config = make_config(data, tmp_path / "killed", **settings)
    for step in (2, 4, 7, 8, 11):
        interrupt(config, step)
    result = fit(config)
    assert result.resumed_from is not None
    assert result.resumed_from >= 9
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


def test_dropout_is_drawn_anew_for_every_micro_batch(data: Path, tmp_path: Path) -> None:
    """The test above would also pass if dropout were off."""
    model = GPT2_WITH_DROPOUT | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    for name, keys in (("on", GPT2_WITH_DROPOUT), ("off", model)):
        fit(make_config(data, tmp_path / name, {"from_config": keys}, train={"steps": 1}))
    assert read_metrics(tmp_path / "on")[1]["loss"] != read_metrics(tmp_path / "off")[1]["loss"]


def test_another_number_of_micro_batches_resumes_with_the_same_rows(data: Path, tmp_path: Path) -> None:
    fit(make_config(data, tmp_path / "whole"))
    interrupt(make_config(data, tmp_path / "run"), 7)
    fit(make_config(data, tmp_path / "run", batch={"tokens": 80, "micro_rows": 5}))
    whole, resumed = (
        [(r["step"], r["rows"], r["lr"], r["loss"]) for r in read_metrics(tmp_path / name) if "loss" in r]
        for name in ("whole", "run")
    )
    assert [record[:3] for record in resumed] == [record[:3] for record in whole]
    assert [record[3] for record in resumed] == pytest.approx([record[3] for record in whole], rel=1e-5)


def test_a_longer_run_goes_on_from_a_finished_one(data: Path, tmp_path: Path) -> None:
    optim = {"lr": 1e-2, "schedule": "constant"}
    fit(make_config(data, tmp_path / "whole", optim=optim))
    fit(make_config(data, tmp_path / "run", optim=optim, train={"steps": 6, "seed": 3}))
    assert fit(make_config(data, tmp_path / "run", optim=optim)).resumed_from == 6
    losses = [[r["loss"] for r in curve(tmp_path / name) if "loss" in r] for name in ("whole", "run")]
    assert losses[0] == losses[1]


def test_the_learning_rate_of_a_longer_run_follows_its_own_schedule(data: Path, tmp_path: Path) -> None:
    fit(make_config(data, tmp_path / "whole", optim={"lr": 1e-2, "schedule": "linear"}))
    settings = {"optim": {"lr": 1e-2, "schedule": "linear"}}
    fit(make_config(data, tmp_path / "run", **settings, train={"steps": 6, "seed": 3}))
    fit(make_config(data, tmp_path / "run", **settings))
    rates = [[r["lr"] for r in curve(tmp_path / name) if "lr" in r][6:] for name in ("whole", "run")]
    assert rates[0] == rates[1]


def test_a_finished_run_is_left_alone_and_force_starts_over(data: Path, tmp_path: Path) -> None:
    config = make_config(data, tmp_path / "run", train={"steps": 2})
    first = fit(config)
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").rglob("*"))}
    again = fit(config)
    assert (again.loss, again.resumed_from) == (first.loss, 2)
    assert {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").rglob("*"))} == before
    assert fit(config, force=True).resumed_from is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"batch": {"tokens": 6 * 16}}, "rows of a step: 5 in the checkpoint, 6 now"),
        ({"train": {"steps": 12, "seed": 4}}, "train.seed: 3 in the checkpoint, 4 now"),
        ({"model": {"from_config": LLAMA | {"num_hidden_layers": 3}}}, "num_hidden_layers: 2 in the checkpoint, 3 now"),
        ({"train": {"steps": 1, "seed": 3}}, "2 steps are done, more than the run's 1"),
    ],
)
def test_a_run_that_became_another_is_not_resumed(data: Path, tmp_path: Path, changes: dict, word: str) -> None:
    fit(make_config(data, tmp_path / "run", train={"steps": 2, "seed": 3}))
    with pytest.raises(ConfigError) as caught:
        fit(make_config(data, tmp_path / "run", **changes))
    assert word in str(caught.value)


def test_other_data_is_not_resumed(data: Path, tmp_path: Path) -> None:
    fit(make_config(data, tmp_path / "run", train={"steps": 2}))
    other = write_dataset(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="dataset digest"):
        fit(make_config(other, tmp_path / "run", train={"steps": 2}))


def test_the_same_data_at_another_place_is(data: Path, tmp_path: Path) -> None:
    fit(make_config(data, tmp_path / "run", train={"steps": 2}))
    (tmp_path / "link").symlink_to(data)
    assert fit(make_config(tmp_path / "link", tmp_path / "run", train={"steps": 3})).resumed_from == 2


def test_a_request_to_stop_saves_the_step_and_resumes(data: Path, tmp_path: Path, monkeypatch) -> None:
    from llmt_train import callbacks

    log = callbacks.StepCallback._log

    def log_and_ask(self, trainer, step, record) -> None:
        log(self, trainer, step, record)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    fit(make_config(data, tmp_path / "whole"))
    monkeypatch.setattr(callbacks.StepCallback, "_log", log_and_ask)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match=r"saved at step 5; run the same command again"):
        fit(make_config(data, tmp_path / "run"))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert fit(make_config(data, tmp_path / "run")).resumed_from == 5
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_before_the_weights(data: Path, tmp_path: Path, monkeypatch) -> None:
    from llmt_train import fit as fit_module

    class Poisoned(fit_module.TrainModule):
        def training_step(self, batch, batch_idx):
            is_bad = self.trainer.global_step == 3 and batch_idx % 3 == 1
            loss = super().training_step(batch, batch_idx)
            if is_bad:
                self.step_parts[-1].measures["loss"] += float("nan")
            return loss * float("nan") if is_bad else loss

    monkeypatch.setattr(fit_module, "TrainModule", Poisoned)
    with pytest.raises(DataError, match=r"step 4: the loss is nan.*Rows \d+, \d+; documents .*optim\.lr"):
        fit(make_config(data, tmp_path / "run"))
    assert [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record] == [1, 2, 3]
    state = saved_tensors(tmp_path / "run/checkpoints/step-00000003")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_bf16_keeps_weights_and_optimizer_state_in_fp32(data: Path, tmp_path: Path) -> None:
    model = {"from_config": LLAMA}
    result = fit(make_config(data, tmp_path / "run", model, precision="bf16"))
    assert result.loss < 0.8 * math.log(WORDS)
    assert {tensor.dtype for tensor in saved_tensors(Path(result.checkpoint)).values()} == {torch.float32}


def test_a_dataset_that_holds_nothing_out_is_not_evaluated(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", validation_rows=0)
    assert fit(make_config(data, tmp_path / "run", train={"steps": 2})).eval_loss is None


def test_the_best_checkpoints_cannot_be_told_where_nothing_is_held_out(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", validation_rows=0)
    changes = {"save": {"every": 2, "keep_best": 1}, "eval": {"every": 2}}
    with pytest.raises(ConfigError, match=r"save\.keep_best: .*data holds nothing out"):
        fit(make_config(data, tmp_path / "run", **changes))


def test_held_out_documents_without_a_single_target_are_not_evaluated(tmp_path: Path, monkeypatch) -> None:
    cut, calls = tiny_dataset._cut, itertools.count()
    monkeypatch.setattr(tiny_dataset, "_cut", lambda *of: [1] if next(calls) >= 24 else cut(*of))
    data = write_dataset(tmp_path / "data", num_rows=24)
    assert fit(make_config(data, tmp_path / "run", train={"steps": 2})).eval_loss is None


def test_tensorboard_gets_the_same_numbers(data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(make_config(data, tmp_path / "run", log=["jsonl", "tensorboard"], train={"steps": 2}))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [record["loss"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 2]


def test_token_ids_left_out_are_those_of_the_dataset(data: Path, tmp_path: Path) -> None:
    folder = Path(fit(make_config(data, tmp_path / "run", train={"steps": 1})).checkpoint)
    config = checkpoints.read_json(folder, "config.json")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, WORDS - 1, None)


def refused(config: RunConfig) -> str:
    with pytest.raises(LlmtError) as caught:
        fit(config)
    assert not (config.output / "checkpoints").exists()
    return str(caught.value)


def test_a_vocabulary_smaller_than_the_datasets_is_refused(data: Path, tmp_path: Path) -> None:
    config = make_config(data, tmp_path / "run", {"from_config": LLAMA | {"vocab_size": WORDS - 1}})
    assert f"vocab_size >= {WORDS}" in refused(config)


def test_too_few_learned_positions_are_refused(data: Path, tmp_path: Path) -> None:
    config = make_config(data, tmp_path / "run", {"from_config": GPT2_WITH_DROPOUT | {"n_positions": 15}})
    assert "15 positions" in refused(config)


def test_rotary_positions_must_only_serve_the_longest_segment(data: Path, tmp_path: Path) -> None:
    keys = LLAMA | {"max_position_embeddings": 4}
    assert "4 positions" in refused(make_config(data, tmp_path / "run", {"from_config": keys}))
    longest = LLAMA | {"max_position_embeddings": 15}
    assert fit(make_config(data, tmp_path / "fits", {"from_config": longest}, train={"steps": 1})).steps == 1


@pytest.mark.parametrize(("original", "is_refused"), [(4, True), (15, False)])
def test_rotary_factors_that_a_long_document_would_switch_for_its_neighbours_are_refused(
    data: Path, tmp_path: Path, original: int, is_refused: bool
) -> None:
    factors = [1.0] * (LLAMA["hidden_size"] // LLAMA["num_attention_heads"] // 2)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors, "factor": 2.0}
    keys = LLAMA | {"rope_parameters": rope | {"original_max_position_embeddings": original}}
    config = make_config(data, tmp_path / "run", {"from_config": keys}, train={"steps": 1})
    if is_refused:
        assert f"longer than {original} tokens" in refused(config)
    else:
        assert fit(config).steps == 1


def test_a_model_that_lets_documents_see_each_other_is_refused(data: Path, tmp_path: Path) -> None:
    bloom = {"model_type": "bloom", "vocab_size": WORDS, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    assert "bloom" in refused(make_config(data, tmp_path / "run", {"from_config": bloom}))


def test_a_dataset_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such dataset"):
        fit(make_config(tmp_path / "nothing", tmp_path / "run"))


def test_an_output_that_is_a_file_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="no folder"):
        fit(make_config(data, tmp_path / "run"))


def test_an_output_that_cannot_be_made_is_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="output: /proc/run cannot be made"):
        fit(make_config(data, Path("/proc/run")))


def test_a_step_of_absurd_size_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wanted a step that sees no row more than 100 times"):
        fit(make_config(data, tmp_path / "run", batch={"tokens": 16 * 24 * 101}))


def test_two_runs_never_share_a_folder(data: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another run is writing here; stop it"):
            fit(make_config(data, tmp_path / "run"))


def test_a_folder_of_something_else_is_left_alone(data: Path, tmp_path: Path) -> None:
    mine = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for force in (False, True):
        with pytest.raises(ConfigError, match="holds tokenizer of something else"):
            fit(make_config(data, tmp_path / "run"), force=force)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("damage", ["removed", b"\xff\xfe", b"3\n"])
def test_a_finished_run_whose_metrics_have_gone_is_still_finished(data: Path, tmp_path: Path, damage: Any) -> None:
    config = make_config(data, tmp_path / "run", train={"steps": 1})
    fit(config)
    path = tmp_path / "run" / "metrics.jsonl"
    path.unlink() if damage == "removed" else path.write_bytes(damage)
    result = fit(config)
    assert (result.steps, result.loss, result.resumed_from) == (1, None, 1)
    assert fit(make_config(data, tmp_path / "run", train={"steps": 2})).loss is not None


def test_a_held_out_document_needs_its_positions_too(tmp_path: Path, monkeypatch) -> None:
    data = write_dataset(tmp_path / "data")
    monkeypatch.setattr(Split, "longest_segment", lambda split: 12 if split.path.name == "validation" else 4)
    keys = LLAMA | {"max_position_embeddings": 8}
    assert "up to 12 tokens" in refused(make_config(data, tmp_path / "run", {"from_config": keys}))
