"""A real model through the whole: SmolLM2-135M-Instruct learns chats and preferences, and leaves for transformers.

A step of a real model takes seconds on a CPU, so the tests that always run take few; those marked slow go far enough
to see that something was learned.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmt_prep.config import MixConfig
from llmt_prep.pipeline import build_dataset
from llmt_shared.dataset import Split, open_dataset
from llmt_train.checkpoints import find_checkpoint
from llmt_train.config import RunConfig
from llmt_train.data.batch import collate
from llmt_train.export import export, load_checkpoint_model
from llmt_train.fit import fit
from llmt_train.precompute import precompute
from llmt_train.watch.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("all_threads")
CHATS = Path(__file__).parents[1] / "data" / "chat"


def pack(kind: str, records: Path, tokenizer: Path, output: Path, length: int, **more: object) -> Path:
    mix = {
        "kind": kind, "output": output, "tokenizer": str(tokenizer), "sequence": {"length": length, "overflow": "drop"},
        "sources": {"a": {"path": str(records)}}, **more,
    }  # fmt: skip
    build_dataset(MixConfig.model_validate(mix), workers=1)
    return output


def shortest_pairs(number: int, path: Path) -> Path:
    lines = (CHATS / "hh-rlhf-harmless.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(sorted(lines, key=len)[:number]))
    return path


def train(task: str, model: Path, data: Path, output: Path, **settings: Any) -> list[dict[str, Any]]:
    """The metrics of a run whose steps take two rows."""
    fit(run_config(task, model, data, output, **settings))
    return read_metrics(output)


def run_config(task: str, model: Path, data: Path, output: Path, *, steps: int, lr: float, **more: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "task": task, "model": str(model), "data": data, "output": output, "precision": "fp32",
            "batch": {"tokens": 2 * open_dataset(data).train.length}, "train": {"steps": steps},
            "optim": {"lr": lr, "schedule": "constant", "warmup": 1}, **more,
        }
    )  # fmt: skip


def held_out(metrics: list[dict[str, Any]]) -> list[float]:
    return [record["eval"]["loss"] for record in metrics if "eval" in record]


def curve(metrics: list[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in metrics if name in record]


@torch.no_grad()
def plain_logits(folder: Path, tokens: NDArray[np.int64]) -> torch.Tensor:
    """[1, N, V] by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(input_ids=torch.from_numpy(tokens)).logits


@torch.no_grad()
def plain_logps(folder: Path, split: Split) -> NDArray[np.float64]:
    """[pairs, 2] log-probabilities of the answers by plain transformers, one side at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums = []
    for number in range(split.num_rows):
        row, pairs = split[number], split.pairs([number])
        for segment in pairs.segments.ravel() + 1:
            place = row.segment_ids == segment
            tokens, labels = (torch.from_numpy(x[place].astype(np.int64)) for x in (row.tokens, row.labels))
            logps = model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
            sums.append(logps[labels >= 0, labels[labels >= 0]].sum().item())
    return np.array(sums).reshape(-1, 2)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Folder of a run, removed with the test: its checkpoint has 1.6 GB."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.fixture(scope="module")
def tuned(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of three steps on conversations."""
    folder = tmp_path_factory.mktemp("tuned")
    chats = CHATS / "self-instruct.jsonl"
    data = pack("sft", chats, smollm2, folder / "data", 256, holdout={"fraction": 0.03})
    train("sft", smollm2, data, folder / "run", steps=3, lr=5e-5)
    yield folder / "run"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def exported(tuned: Path) -> Path:
    """What `export --check` makes of it."""
    result = export(tuned, tuned.parent / "model", check=True)
    assert result.largest_difference is not None
    assert result.largest_difference <= 1e-5
    return tuned.parent / "model"


@pytest.fixture(scope="module")
def four_pairs(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows: every step takes them all."""
    folder = tmp_path_factory.mktemp("pairs")
    data = pack("preference", shortest_pairs(4, folder / "pairs.jsonl"), smollm2, folder / "data", 224)
    assert open_dataset(data).train.num_rows == 2
    return data


@pytest.fixture(scope="module")
def many_pairs(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    return pack("preference", shortest_pairs(64, folder / "pairs.jsonl"), smollm2, folder / "data", 512)


def test_sft_lowers_the_held_out_loss(tuned: Path) -> None:
    before, after = held_out(read_metrics(tuned))
    assert after < before - 0.02


@pytest.mark.slow
def test_sft_on_all_conversations_lowers_the_held_out_loss(smollm2: Path, output: Path) -> None:
    chats = CHATS / "self-instruct.jsonl"
    data = pack("sft", chats, smollm2, output.parent / "data", 512, holdout={"fraction": 0.1})
    before, after = held_out(train("sft", smollm2, data, output, steps=10, lr=5e-5))
    assert after < before - 0.1


def test_transformers_gives_the_logits_of_the_run(smollm2: Path, tuned: Path, exported: Path) -> None:
    """On a conversation of the run, where its logits are no longer those of the model that it began with."""
    row = open_dataset(tuned.parent / "data").train[0]
    tokens = row.tokens[None, row.segment_ids == 1].astype(np.int64)
    length = np.array([tokens.shape[1]])
    batch = collate(tokens, np.array([1]), length, np.array([0]), None, {"targets": 1.0})
    ours = load_checkpoint_model(find_checkpoint(tuned))
    wanted = ours(input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments()).logits
    torch.testing.assert_close(plain_logits(exported, tokens), wanted, rtol=0, atol=1e-5)
    assert (plain_logits(smollm2, tokens) - wanted).abs().max() > 0.1


def test_transformers_generates_with_the_export(exported: Path) -> None:
    """Greedily, until the model ends its turn; what the dataset's tokenizer makes of it is text."""
    tokenizer, model = (kind.from_pretrained(exported) for kind in (AutoTokenizer, AutoModelForCausalLM))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)


def test_dpo_begins_at_ln_2_and_falls(smollm2: Path, four_pairs: Path, output: Path) -> None:
    metrics = train("dpo", smollm2, four_pairs, output, steps=2, lr=1e-5)
    loss, margin = curve(metrics, "loss"), curve(metrics, "margin")
    assert loss[0] == pytest.approx(math.log(2), abs=1e-6)  # the policy is the reference
    assert loss[1] < math.log(2)
    assert margin[1] > 0


@pytest.mark.slow
def test_dpo_tells_chosen_from_rejected(smollm2: Path, many_pairs: Path, output: Path) -> None:
    """Plain transformers finds what the run learned: the ratio to the first model is larger for the chosen answer."""
    settings = {"steps": 24, "lr": 1e-5, "dpo": {"reference": "precomputed"}}
    precompute(run_config("dpo", smollm2, many_pairs, output, **settings))
    metrics = train("dpo", smollm2, many_pairs, output, **settings)
    export(output, output / "model")
    split = open_dataset(many_pairs).train
    ratios = plain_logps(output / "model", split) - plain_logps(smollm2, split)
    accuracy = (ratios[:, 0] > ratios[:, 1]).mean()
    first, last = (mean(losses) for losses in (curve(metrics, "loss")[:8], curve(metrics, "loss")[-8:]))
    print(f"64 pairs: accuracy {accuracy:.3f}; loss {first:.4f} over the first 8 steps, {last:.4f} over the last 8")
    assert len(ratios) == 64
    assert accuracy > 0.6
    assert last < first


def test_orpo_lowers_its_loss_and_raises_the_odds(smollm2: Path, four_pairs: Path, output: Path) -> None:
    metrics = train("orpo", smollm2, four_pairs, output, steps=2, lr=1e-5)
    loss, log_odds = curve(metrics, "loss"), curve(metrics, "log_odds")
    assert loss[1] < loss[0]
    assert log_odds[1] > log_odds[0]


@pytest.mark.slow
def test_orpo_tells_chosen_from_rejected(smollm2: Path, many_pairs: Path, output: Path) -> None:
    metrics = train("orpo", smollm2, many_pairs, output, steps=24, lr=1e-5)
    for name, sign in (("loss", -1), ("log_odds", 1), ("accuracy", 1)):
        first, last = mean(curve(metrics, name)[:8]), mean(curve(metrics, name)[-8:])
        print(f"{name}: {first:.4f} over the first 8 steps, {last:.4f} over the last 8")
        assert sign * (last - first) > 0
