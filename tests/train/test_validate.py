"""A checkpoint scores what its run scored, bit for bit, and on other data what it should; or it is refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_datasets
import torch
from train.tiny_dataset import WORDS, write_dataset

from llmt_shared.dataset import Split, open_dataset
from llmt_shared.errors import ConfigError, FormatError
from llmt_train.cli import main
from llmt_train.config import RunConfig
from llmt_train.fit import fit
from llmt_train.model.load import load_model
from llmt_train.precompute import precompute
from llmt_train.trained import load_checkpoint_model
from llmt_train.validate import ValidateResult, table, validate
from llmt_train.watch.metrics import read_metrics

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
}  # fmt: skip
DROPOUT = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "resid_pdrop": 0.2,
    "embd_pdrop": 0.2, "attn_pdrop": 0.2,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "pretrain": {"task": "pretrain"},
    "pretrain with dropout": {"task": "pretrain", "model": {"from_config": DROPOUT}},
    "pretrain in bf16": {"task": "pretrain", "precision": "bf16"},
    "pretrain in bf16 throughout": {"task": "pretrain", "precision": "bf16-true"},
    "sft": {"task": "sft", "clm": {"neftune": 5, "label_smoothing": 0.1}},
    "dpo, live reference": {"task": "dpo", "dpo": {"sft_weight": 0.5}},
    "dpo, precomputed": {"task": "dpo", "dpo": {"reference": "precomputed"}},
    "dpo, no reference": {"task": "dpo", "dpo": {"reference": "none"}},
    "dpo with adapters": {"task": "dpo", "lora": {"rank": 4}},
    "dpo with adapters in bf16 throughout": {"task": "dpo", "lora": {"rank": 4}, "precision": "bf16-true"},
    "dpo with adapters, precomputed": {"task": "dpo", "lora": {"rank": 4}, "dpo": {"reference": "precomputed"}},
    "orpo": {"task": "orpo", "orpo": {"nll_on": "all"}},
    "synthetic": {"task": "dpo", "data": {"synthetic": {"length": 200, "median": 20, "held_out": 5, "vocab_size": 40}}},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    pretrain = write_dataset(folder / "pretrain", length=200, num_rows=24, validation_rows=7)
    return {"pretrain": pretrain} | {
        kind: small_datasets.build_chats(folder / kind, kind) for kind in ("sft", "preference")
    }


def make_config(packed: dict[str, Path], output: Path, **changes: Any) -> RunConfig:
    kind = {"dpo": "preference", "orpo": "preference"}.get(changes["task"], changes["task"])
    run = {
        "model": {"from_config": LLAMA}, "data": str(packed[kind]), "output": str(output),
        "batch": {"tokens": 800, "micro_rows": 3}, "train": {"steps": 6, "seed": 3}, "optim": {"lr": 3e-3},
        "eval": {"every": 2}, "save": {"every": 2},
    }  # fmt: skip
    return RunConfig.model_validate(run | changes)


def evaluations(output: Path) -> dict[int, Any]:
    return {record["step"]: record["eval"] for record in read_metrics(output) if "eval" in record}


def begun_with(data: Path, folder: Path) -> str:
    """A model on disk, as adapters need one."""
    vocab_size = open_dataset(data).tokenizer.max_id + 1
    load_model({"from_config": LLAMA | {"vocab_size": vocab_size}}, seed=1).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(packed, tmp_path_factory) -> Path:
    """A finished run of task pretrain."""
    output = tmp_path_factory.mktemp("runs") / "pretrain"
    fit(make_config(packed, output, task="pretrain"))
    return output


@pytest.mark.parametrize("name", RUNS)
def test_it_is_the_runs_own_last_evaluation_bit_for_bit(packed, tmp_path, name):
    changes = dict(RUNS[name])
    if "lora" in changes:
        changes["model"] = begun_with(packed["preference"], tmp_path / "begun")
    config = make_config(packed, tmp_path / "run", **changes)
    if config.dpo.reference == "precomputed":
        precompute(config)
    fit(config)
    result = validate(tmp_path / "run")
    assert result.eval == evaluations(tmp_path / "run")[6]
    assert result.eval != evaluations(tmp_path / "run")[4]
    assert (result.step, result.split) == (6, "validation")


def test_an_older_checkpoint_scores_what_the_run_scored_then(run):
    assert validate(run / "checkpoints" / "step-00000004").eval == evaluations(run)[4]


def test_rows_of_a_step_bound_those_of_a_micro_batch_as_in_the_run(packed, tmp_path):
    fit(make_config(packed, tmp_path / "run", task="pretrain", batch={"tokens": 400, "micro_rows": 5}))
    assert validate(tmp_path / "run").eval == evaluations(tmp_path / "run")[6]


def plain_loss(checkpoint: Path, split: Split) -> float:
    """Of plain transformers on every segment alone, over all targets."""
    model = load_checkpoint_model(checkpoint)
    model.set_attn_implementation("eager")
    losses = []
    for number in range(split.num_rows):
        row = split[number]
        for first, last in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            ids, labels = (torch.from_numpy(x[first:last].astype(np.int64)) for x in (row.tokens, row.labels))
            with torch.no_grad():
                logps = model(ids[None]).logits[0].log_softmax(-1)
            losses += [-logps[place, label].item() for place, label in enumerate(labels) if label >= 0]
    return float(np.mean(losses))


@pytest.mark.parametrize("split", ["validation", "train"])
def test_every_row_of_the_split_counts_as_in_plain_transformers(packed, run, split):
    rows = {"train": open_dataset(packed["pretrain"]).train, "validation": open_dataset(packed["pretrain"]).validation}
    result = validate(run, split=split)
    assert result.eval["loss"] == pytest.approx(plain_loss(Path(result.checkpoint), rows[split]), rel=1e-5)
    assert result.eval["targets"] == rows[split].row_targets[:].sum()
    assert result.rows == rows[split].num_rows


def test_larger_micro_batches_change_nothing_but_rounding(run):
    one, other = (validate(run, [f"batch.micro_rows={rows}"]).eval for rows in (1, 4))
    assert one["targets"] == other["targets"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_another_dataset_is_measured_whatever_the_length_of_its_rows(run, tmp_path):
    other = write_dataset(tmp_path / "other", length=48, validation_rows=5, seed=1)
    result = validate(run, [f"data={other}"])
    dataset = open_dataset(other)
    assert (result.data, result.digest) == (str(other), dataset.digest)
    assert result.eval["targets"] == dataset.validation.row_targets[:].sum()
    assert result.eval["loss"] == pytest.approx(plain_loss(Path(result.checkpoint), dataset.validation), rel=1e-5)


def test_synthetic_rows_can_take_a_datasets_place(run):
    result = validate(run, ["data={synthetic: {length: 64, held_out: 3}}"])
    assert (result.data, result.rows, list(result.eval["sources"])) == ("synthetic", 3, ["synthetic"])


def test_a_checkpoint_away_from_its_run_is_measured_too(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "step-00000006", tmp_path / "alone")
    assert validate(tmp_path / "alone").eval == evaluations(run)[6]


def test_a_run_is_left_as_it_is(run):
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    before = state()
    validate(run)
    assert state() == before


def test_dpo_measures_other_pairs_against_the_model_that_it_began_with(packed, tmp_path):
    run = tmp_path / "run"
    fit(make_config(packed, run, task="dpo", model=begun_with(packed["preference"], tmp_path / "begun")))
    other = small_datasets.build_chats(tmp_path / "other", "preference", seed=4)
    assert open_dataset(other).digest != open_dataset(packed["preference"]).digest
    result = validate(run, [f"data={other}"]).eval
    assert result["loss"] == pytest.approx(evaluations(run)[6]["loss"], rel=1e-5)  # the same pairs in another order
    assert result["loss"] != pytest.approx(np.log(2), rel=1e-3)


def test_a_reference_with_drawn_weights_belongs_to_its_dataset(packed, tmp_path):
    fit(make_config(packed, tmp_path / "run", task="dpo", train={"steps": 1}))
    other = small_datasets.build_chats(tmp_path / "other", "preference", seed=4)
    with pytest.raises(ConfigError, match=r"its reference was drawn for the vocabulary of the run's own dataset"):
        validate(tmp_path / "run", [f"data={other}"])
    assert validate(tmp_path / "run", [f"data={other}", "dpo.reference=none"]).eval["pairs"] > 0


def test_a_reference_may_be_read_from_the_disk_where_the_run_had_it_live(packed, tmp_path):
    config = make_config(packed, tmp_path / "run", task="dpo")
    fit(config)
    precompute(config)
    live, read = (validate(tmp_path / "run", changes).eval for changes in ([], ["dpo.reference=precomputed"]))
    assert read["loss"] == pytest.approx(live["loss"], abs=1e-6)


def test_a_dataset_without_the_split_is_refused(run, tmp_path):
    data = write_dataset(tmp_path / "data", validation_rows=0)
    with pytest.raises(ConfigError, match=r"data: no split 'validation'; wanted one of: train$"):
        validate(run, [f"data={data}"])
    with pytest.raises(ConfigError, match=r"no split 'test'; wanted one of: train, validation$"):
        validate(run, split="test")


def test_a_dataset_of_another_tokenizer_is_refused(run, tmp_path):
    data = write_dataset(tmp_path / "data", words=WORDS - 4)
    with pytest.raises(ConfigError, match=r"pretrain/tokenizer: its tokenizer is not the one that packed the dataset"):
        validate(run, [f"data={data}"])


def test_a_dataset_of_another_kind_is_refused(packed, run):
    with pytest.raises(ConfigError, match=r"task: pretrain, but .* is of kind sft; set `task: sft`"):
        validate(run, [f"data={packed['sft']}"])


def test_a_larger_vocabulary_is_refused_where_the_tokenizer_is_not_known(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "step-00000006", tmp_path / "alone")
    data = write_dataset(tmp_path / "data", words=WORDS + 1)
    with pytest.raises(ConfigError, match=rf"alone: the dataset's tokenizer can produce id {WORDS}, but the model has"):
        validate(tmp_path / "alone", [f"data={data}"])


def test_positions_must_serve_the_segments_of_the_dataset(packed, tmp_path):
    data = write_dataset(tmp_path / "short", length=40)
    model = {"from_config": DROPOUT | {"n_positions": 50}}
    fit(make_config(packed, tmp_path / "run", task="pretrain", model=model, data=str(data)))
    with pytest.raises(ConfigError, match="50 positions"):
        validate(tmp_path / "run", [f"data={packed['pretrain']}"])


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FormatError, match="no complete checkpoint"):
        validate(tmp_path)


def test_an_override_is_checked_as_in_a_run_file(run):
    with pytest.raises(ConfigError, match=r"batch\.micro_row: unknown key, did you mean 'micro_rows'"):
        validate(run, ["batch.micro_row=3"])


def test_the_table_is_aligned():
    sources = {"web": {"loss": 2.5, "nll": 2.5, "targets": 1000, "perplexity": 12.18}, "code": {"loss": 0.123456}}
    scores = {"loss": 1.5, "nll": 1.5, "targets": 123456, "perplexity": 4.4817, "sources": sources}
    text = table(ValidateResult("runs/x/checkpoints/step-00000002", 2, "data/x", "d", "validation", 1234, scores))
    assert text == (
        "runs/x/checkpoints/step-00000002 on data/x, validation: 1,234 rows\n"
        "         loss     nll  targets  perplexity\n"
        "total  1.5000  1.5000  123,456      4.4817\n"
        "web    2.5000  2.5000    1,000     12.1800\n"
        "code   0.1235       -        -           -"
    )


def test_a_source_called_total_hides_nothing():
    scores = {"loss": 1.5, "sources": {"total": {"loss": 2.5}}}
    lines = table(ValidateResult("c", 2, "d", "d", "train", 1, scores)).splitlines()
    assert [line.split() for line in lines[2:]] == [["total", "1.5000"], ["total", "2.5000"]]


@pytest.fixture
def call(monkeypatch, capsys):
    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llmt-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return (caught.value.code or 0, *capsys.readouterr())

    return called


def test_the_command_prints_a_table_or_json_on_stdout_and_progress_on_stderr(packed, run, call):
    code, out, err = call("validate", run)
    assert code == 0
    assert out.startswith(f"{run}/checkpoints/step-00000006 on {packed['pretrain']}, validation: 7 rows\n")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["loss", "total", "web", "code"]
    assert "validation rows: done" in err
    code, out, _ = call("validate", run, "batch.micro_rows=3", "--split", "validation", "--json")
    assert (code, json.loads(out)["eval"]) == (0, evaluations(run)[6])


@pytest.mark.parametrize(
    ("arguments", "wanted", "message"),
    [
        (["data=/nowhere"], 3, "/nowhere: no such dataset"),
        (["--split", "test"], 2, "no split 'test'"),
        (["optim.lr=fast"], 2, "optim.lr: found 'fast'"),
    ],
)
def test_a_failure_is_one_message_with_its_exit_code(run, call, arguments, wanted, message):
    code, out, err = call("validate", run, *arguments)
    assert (code, out) == (wanted, "")
    assert message in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
