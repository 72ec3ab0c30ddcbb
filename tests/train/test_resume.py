"""Every objective resumes bit for bit, wherever it is stopped."""

import signal
from pathlib import Path

import numpy as np
import pytest
import small_datasets
from train.interrupted import curve, interrupt

from llmt_train.config import RunConfig
from llmt_train.fit import fit
from llmt_train.precompute import precompute

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "attention_dropout": 0.1}  # fmt: skip

TASKS = {
    "sft with all there is": ("sft", {"clm": {"neftune": 5, "z_loss": 1e-3, "label_smoothing": 0.1}}),
    "dpo, live reference": ("dpo", {"dpo": {"sft_weight": 0.5}}),
    "dpo, precomputed": ("dpo", {"dpo": {"reference": "precomputed", "loss": "ipo", "length_normalised": True}}),
    "orpo": ("orpo", {"orpo": {"nll_on": "all"}}),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return {kind: small_datasets.build_chats(folder / kind, kind) for kind in ("sft", "preference")}


def make_config(packed, folder: Path, name: str, **changes) -> RunConfig:
    task, settings = TASKS[name]
    data = packed["sft" if task == "sft" else "preference"]
    run = {
        "task": task, "model": {"from_config": LLAMA}, "data": str(data), "output": str(folder),
        "batch": {"tokens": 1000, "micro_rows": 2}, "train": {"steps": 12, "seed": 3},
        "optim": {"lr": 3e-3, "warmup": "20%"}, "eval": {"every": 4}, "save": {"every": 3, "keep": 2},
    }  # fmt: skip
    return RunConfig.model_validate(run | settings | changes)


def interrupted_equals_whole(packed, tmp_path: Path, name: str, count: int) -> None:
    whole, config = make_config(packed, tmp_path / "whole", name), make_config(packed, tmp_path / "run", name)
    if name == "dpo, precomputed":
        precompute(whole)
    steps = fit(whole).steps
    random = np.random.default_rng(len(name))
    for step in sorted(random.choice(np.arange(1, steps - 1), count, replace=False).tolist()):
        interrupt(config, step, signal.SIGKILL if random.random() < 0.5 else signal.SIGTERM)
    assert fit(config).resumed_from is not None
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


@pytest.mark.parametrize("name", TASKS)
def test_kills_and_requests_to_stop_change_nothing(packed, tmp_path, name):
    interrupted_equals_whole(packed, tmp_path, name, 3)


def test_checkpoints_written_beside_the_training_are_as_good(packed, tmp_path):
    name, save = "orpo", {"every": 1, "keep": 2, "asynchronous": True}
    whole, config = (
        make_config(packed, tmp_path / "whole", name),
        make_config(packed, tmp_path / "run", name, save=save),
    )
    fit(whole)
    interrupt(config, 3, signal.SIGKILL)
    interrupt(config, 6, signal.SIGTERM)
    assert fit(config).resumed_from is not None
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_stopping_at_many_steps_changes_nothing(packed, tmp_path, name):
    interrupted_equals_whole(packed, tmp_path, name, 6)


def weights_of(folder: Path) -> Path:
    [file] = (folder / "tensors").glob("*.distcp")
    return file


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_survived(packed, tmp_path, damage, capfd):
    config = make_config(packed, tmp_path / "run", "orpo")
    newest = Path(fit(config).checkpoint)
    before = curve(tmp_path / "run")
    content = bytearray(weights_of(newest).read_bytes())
    content[len(content) // 2] ^= 1
    weights_of(newest).write_bytes({"truncated": content[:-100], "flipped": content, "emptied": b""}[damage])
    assert fit(config).resumed_from == 9
    assert curve(tmp_path / "run") == before
    if damage == "flipped":  # the others are seen by their size
        assert "is wrong; set aside as damaged-step-00000012" in capfd.readouterr().err


def test_a_run_all_of_whose_checkpoints_are_damaged_starts_over(packed, tmp_path):
    config = make_config(packed, tmp_path / "run", "dpo, live reference", train={"steps": 3, "seed": 3})
    first = fit(config)
    before = curve(tmp_path / "run")
    content = bytearray(weights_of(Path(first.checkpoint)).read_bytes())
    content[len(content) // 2] ^= 1
    weights_of(Path(first.checkpoint)).write_bytes(content)
    assert fit(config).resumed_from is None
    assert curve(tmp_path / "run") == before
