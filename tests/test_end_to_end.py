"""Both stages on the command line: text becomes a dataset, a dataset a model, a model a Hugging Face folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from tokenizers import Tokenizer

STAGES = {
    "prep": "from llmt_prep.cli import main; main()",
    "train": "from llmt_train.cli import main; main()",
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def run(stage: str, *arguments: str | Path) -> Any:
    command = [sys.executable, "-c", STAGES[stage], *map(str, arguments), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def write(path: Path, value: dict[str, Any]) -> Path:
    with path.open("w") as file:
        YAML().dump(value, file)
    return path


def test_text_to_dataset_to_model_to_hugging_face(mix: dict[str, Any], texts: list[str], tmp_path: Path) -> None:
    packed = run("prep", "pack", "--mix", write(tmp_path / "mix.yaml", mix), "--workers", "1")
    assert run("prep", "verify", packed["path"])["is_sound"]
    assert run("prep", "stats", packed["path"])

    config = {
        "task": "pretrain",
        "model": {"from_config": LLAMA},
        "data": packed["path"],
        "output": str(tmp_path / "run"),
        "batch": {"tokens": 1024, "micro_rows": 3},
        "train": {"steps": 6},
        "optim": {"lr": 3e-3},
        "save": {"every": 2},
    }
    path = write(tmp_path / "run.yaml", config)
    whole = run("train", "fit", "--config", path)
    assert whole["steps"] == 6
    assert whole["eval_loss"] < 6.5  # ln 600 = 6.4 at the start, and it learns

    # the same run, stopped after 3 steps by a shorter plan and then carried on
    half = [f"output={tmp_path / 'half'}", "optim.schedule=constant"]
    run("train", "fit", "--config", path, *half, "train.steps=3")
    assert run("train", "fit", "--config", path, *half)["resumed_from"] == 3
    again = [f"output={tmp_path / 'again'}", "optim.schedule=constant"]
    run("train", "fit", "--config", path, *again)
    assert losses(tmp_path / "half") == losses(tmp_path / "again")

    exported = run("train", "export", tmp_path / "run", tmp_path / "model", "--check")
    assert exported["largest_difference"] <= 1e-5

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    bare = Tokenizer.from_file(f"{mix['tokenizer']}/tokenizer.json")
    assert tokenizer(texts[0])["input_ids"] == bare.encode(texts[0]).ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    output = model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, attention_mask=torch.ones(1, 3)
    )
    assert output.shape == (1, 6)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("configs/*/*.yaml")), ids=lambda path: path.stem)
def test_every_example_config_is_valid_and_short(path: Path) -> None:
    from llmt_prep.config import MixConfig
    from llmt_shared.config import load_config
    from llmt_train.config import RunConfig

    load_config(path, MixConfig if path.parent.name == "mix" else RunConfig)
    assert len(path.read_text().splitlines()) <= 25
