"""Reference log-probs beside the dataset: right, resumable, and refused where they are of something else."""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import small_datasets
import torch
from typer.testing import CliRunner

from llmt_shared.dataset import open_dataset
from llmt_shared.errors import ConfigError, DataError, FormatError, Stopped
from llmt_train import policy
from llmt_train import precompute as module
from llmt_train.cli import app
from llmt_train.config import RunConfig
from llmt_train.fit import fit
from llmt_train.model.load import load_model
from llmt_train.precompute import precompute
from llmt_train.watch.metrics import read_metrics

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "initializer_range": 0.3}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return small_datasets.build_chats(tmp_path_factory.mktemp("pairs"), "preference")


@pytest.fixture
def data(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "data"))


def make_config(data: Path, **changes) -> RunConfig:
    run = {
        "task": "dpo", "model": {"from_config": LLAMA}, "data": str(data), "output": str(data.with_name("run")),
        "batch": {"tokens": 800, "micro_rows": 2}, "train": {"steps": 6}, "optim": {"lr": 3e-3},
        "dpo": {"reference": "precomputed"},
    }  # fmt: skip
    return RunConfig.model_validate(run | changes)


def values_of(result, split="train"):
    return np.load(Path(result.directory) / f"{split}.npy")


def test_every_side_of_every_pair_has_the_sum_that_plain_transformers_gives_it_alone(data):
    result = precompute(make_config(data))
    dataset = open_dataset(data)
    entry = dataset.manifest.tokenizer
    spec = LLAMA | {"vocab_size": entry.max_id + 1, "eos_token_id": entry.eos_id}
    model = load_model({"from_config": spec}, seed=42).eval()
    model.set_attn_implementation("eager")
    for name, split in (("train", dataset.train), ("validation", dataset.validation)):
        values, seen = values_of(result, name), np.zeros(split.num_segments, bool)
        for number in range(split.num_rows):
            row, pairs = split[number], split.pairs([number])
            for segments, numbers in zip(pairs.segments, pairs.numbers, strict=True):
                for segment, place in zip(segments, numbers, strict=True):
                    piece = slice(*row.cu_seqlens[segment : segment + 2])
                    ids = torch.from_numpy(row.tokens[piece].astype(np.int64))
                    with torch.no_grad():
                        logps = model(ids[None]).logits[0].log_softmax(-1)
                    labels = torch.from_numpy(row.labels[piece])
                    wanted = sum(logps[i, label].item() for i, label in enumerate(labels) if label >= 0)
                    assert values[place] == pytest.approx(wanted, abs=1e-4, rel=1e-6)
                    seen[place] = True
        assert np.array_equal(np.isfinite(values), seen)
    assert result.pairs == result.computed == sum(split.pairs for split in dataset.manifest.splits.values())


def both_curves(data: Path, settings: dict, **changes) -> list[list[dict]]:
    """The records of two runs, with a live reference and with a precomputed one."""
    curves = []
    for reference in ("model", "precomputed"):
        output, dpo = data.with_name(reference), settings | {"reference": reference}
        config = make_config(data, output=str(output), dpo=dpo, train={"steps": 9}, **changes)
        if reference == "precomputed":
            precompute(config)
        fit(config)
        curves.append(read_metrics(output))
    return curves


def losses_of(records: list[dict]) -> list[float]:
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, math.log(2)),
        ({"label_smoothing": 0.2, "length_normalised": True}, math.log(2)),
        ({"loss": "robust", "label_smoothing": 0.2, "beta": 0.5}, math.log(2)),
        ({"loss": "ipo", "beta": 0.5}, 1.0),
    ],
)
def test_both_references_start_where_the_policy_is_and_give_the_same_curve(data, settings, first):
    curves = both_curves(data, settings)
    for records in curves:
        assert (records[0]["step"], records[0]["eval"]["loss"]) == (0, pytest.approx(first, abs=1e-6))
        assert losses_of(records)[0] == pytest.approx(first, abs=1e-6)
        assert len(set(losses_of(records))) == 9
    assert losses_of(curves[0]) == pytest.approx(losses_of(curves[1]), abs=1e-6)


def test_in_bf16_too_policy_and_reference_begin_equal(data):
    for records in both_curves(data, {}, precision="bf16"):
        assert losses_of(records)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_live_reference_has_no_dropout_and_takes_none_from_the_policy(data):
    """What the policy drops is a function of seed and step, whatever else runs before it."""
    live, precomputed = both_curves(data, {}, model={"from_config": LLAMA | {"attention_dropout": 0.2}})
    assert losses_of(live) == pytest.approx(losses_of(precomputed), abs=1e-6)
    assert live[0]["eval"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert losses_of(live)[0] != pytest.approx(math.log(2), abs=1e-3)


def test_a_finished_overlay_is_not_computed_again(data):
    first = precompute(make_config(data))
    again = precompute(make_config(data))
    assert (again.pairs, again.computed) == (first.pairs, 0)


def stop_after(monkeypatch, count: int) -> None:
    finite = module._finite
    calls = iter(range(1, 1 << 30))

    def counted(*arguments):
        if next(calls) == count:
            signal.raise_signal(signal.SIGTERM)
        return finite(*arguments)

    monkeypatch.setattr(module, "_finite", counted)


def test_a_stopped_call_is_gone_on_with_and_gives_the_same_bytes(data, monkeypatch):
    whole = precompute(make_config(data))
    wanted = [values_of(whole, name).tobytes() for name in ("train", "validation")]
    shutil.rmtree(whole.directory)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stopped, match="run the same command again to go on"):
            precompute(make_config(data))
    with pytest.raises(ConfigError, match="is not finished; run `llmt-train ref"):
        fit(make_config(data))
    result = precompute(make_config(data))
    assert 0 < result.computed < result.pairs
    assert [values_of(result, name).tobytes() for name in ("train", "validation")] == wanted


def test_without_an_overlay_the_way_out_is_told(data):
    with pytest.raises(ConfigError, match=r"no reference log-probs for model.from_config .*there are of: none; run"):
        fit(make_config(data))


def test_other_weights_are_refused_and_named(data):
    precompute(make_config(data))
    with pytest.raises(
        ConfigError, match=r"no reference log-probs .*there are of: model\.from_config \([0-9a-f]{16}\)"
    ):
        fit(make_config(data, train={"steps": 2, "seed": 1}))


def test_another_dataset_is_refused(data, tmp_path):
    result = precompute(make_config(data))
    path = Path(result.directory) / "reference.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"digest": "0" * 64}))
    with pytest.raises(ConfigError, match=r"is of the dataset with digest 0{16}, but the run's has [0-9a-f]{16}"):
        fit(make_config(data))


def test_another_precision_is_told_and_served(data, capfd):
    precompute(make_config(data))
    fit(make_config(data, precision="bf16", train={"steps": 1}))
    assert "was computed with precision fp32, the policy runs with bf16" in capfd.readouterr().err


def test_another_precision_is_not_mixed_into_an_overlay(data):
    precompute(make_config(data))
    with pytest.raises(ConfigError, match="was computed with precision fp32, not bf16; --force computes it again"):
        precompute(make_config(data, precision="bf16"))
    assert precompute(make_config(data, precision="bf16"), force=True).computed > 0


@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed"])
def test_a_damaged_overlay_is_refused(data, damage):
    path = Path(precompute(make_config(data)).directory) / "train.npy"
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    else:
        content[200] ^= 1
        path.write_bytes(content if damage == "flipped" else content[:-9])
    with pytest.raises(FormatError, match=r"train\.npy: .*run `llmt-train ref` again"):
        fit(make_config(data))


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_overlay_is_not_called_finished_again(data, damage):
    path = Path(precompute(make_config(data)).directory) / "train.npy"
    sound = path.read_bytes()
    content = bytearray(sound)
    content[200] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:-9])
    with pytest.raises(FormatError, match=r"train\.npy: .*--force"):
        precompute(make_config(data))
    precompute(make_config(data), force=True)
    assert path.read_bytes() == sound


def test_a_reference_that_is_not_finite_is_no_reference(data, monkeypatch):
    monkeypatch.setattr(
        policy, "live_reference", lambda *_, **__: lambda batch: torch.full(batch.pairs.shape, math.nan)
    )
    with pytest.raises(DataError, match=r"no finite log-probability in one of the rows \[0, 1\]"):
        precompute(make_config(data))


def test_only_dpo_has_a_reference(data):
    with pytest.raises(ConfigError, match="task: orpo has no reference"):
        precompute(make_config(data, task="orpo", dpo={}))


def test_the_dataset_itself_is_not_touched(data):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    precompute(make_config(data))
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_the_command_says_where_it_lies(data, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"task: dpo\nmodel: {{from_config: {json.dumps(LLAMA)}}}\ndata: {data}\noutput: {tmp_path / 'run'}\n"
        "batch: {tokens: 800}\ntrain: {steps: 2}\noptim: {lr: 1e-3}\n"
    )
    result = CliRunner().invoke(app, ["ref", "--config", str(config), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["directory"].startswith(str(tmp_path / "data.reference"))
