"""run.yaml: what is accepted, and that a wrong one gives one message with every mistake and its line."""

from pathlib import Path

import pytest

from llmt_prep.config import MixConfig
from llmt_shared.config import load_config
from llmt_shared.errors import ConfigError
from llmt_train.config import FromConfig, RunConfig
from llmt_train.tasks import KINDS

CONFIGS = Path(__file__).parents[2] / "configs"

GOOD = """\
task: pretrain
model: {from_config: {model_type: llama, hidden_size: 32}}
data: data/x
output: runs/x
batch: {tokens: 64K, micro_rows: 2}
train: {steps: 10}
optim: {lr: 3e-4, schedule: wsd, warmup: 3%, decay: 10}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, RunConfig, overrides)


def mistakes(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(str(tmp_path) + "/", "").splitlines()


def test_a_whole_config_is_read(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.model == FromConfig(from_config={"model_type": "llama", "hidden_size": 32})
    assert config.batch.tokens == 64_000
    assert (config.optim.lr, config.optim.warmup, config.optim.decay) == (3e-4, "3%", 10)


def test_what_is_left_out_has_the_documented_default(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert (config.train.seed, config.precision, config.attention, config.log) == (42, "auto", "auto", ("jsonl",))
    assert (config.eval.every, config.save.every, config.save.keep, config.optim.clip) == (None, 500, 3, 1.0)


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD, "optim.lr=1e-5", "model=some/model", "optim.clip=null")
    assert (config.optim.lr, config.model, config.optim.clip) == (1e-5, "some/model", None)


def test_every_mistake_is_listed_with_its_line(tmp_path: Path) -> None:
    text = """\
task: dopo
model: {from_confg: {}}
data: data/x
batch: {tokens: -1, micro_row: 2}
train: {steps: 10, epochs: 1}
optim: {lr: 0, schedule: cosin, warmup: 300%, decay: 5}
log: [jsonl, comet]
"""
    lines = mistakes(tmp_path, text)
    starts = [line.split(": ")[0:2] for line in lines]
    assert ["run.yaml:1", "task"] in starts
    assert ["run.yaml:1", "output"] in starts
    assert ["run.yaml:4", "batch.tokens"] in starts
    assert ["run.yaml:4", "batch.micro_row"] in starts
    assert ["run.yaml:5", "train"] in starts
    assert ["run.yaml:6", "optim.lr"] in starts
    assert ["run.yaml:6", "optim.warmup"] in starts
    assert ["run.yaml:7", "log.1"] in starts
    assert any("decay belongs to schedule wsd" in line for line in lines)
    assert any("from_confg" in line and "did you mean 'from_config'?" in line for line in lines)
    assert any("did you mean 'cosine'?" in line for line in lines)
    assert any("did you mean 'micro_rows'?" in line for line in lines)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("optim.min_lr=1", "min_lr <= lr"),
        ("train={}", "one of `epochs` and `steps`"),
        ("optim.warmup=-1", "share of the run"),
        ("optim.betas=[0.9, 1.0]", "less than 1"),
        ("batch.tokens=1.5", "whole number"),
        ("train.seed=-1", "greater than or equal to 0"),
        ("train.seed=9007199254740992", "less than 9007199254740992"),
        ("train={epochs: .inf}", "finite"),
        ("optim.lr=.inf", "finite"),
        ("optim.betas=[.nan, 0.9]", "finite"),
        ("output=data/x/run", "lies in the dataset"),
        ("output=./data/../data/x", "lies in the dataset"),
        ("model=''", "at least 1"),
    ],
)
def test_a_value_that_cannot_work_is_refused(tmp_path: Path, override: str, word: str) -> None:
    assert word in "\n".join(mistakes(tmp_path, GOOD, override))


def test_what_takes_text_or_keys_says_both(tmp_path: Path) -> None:
    assert mistakes(tmp_path, GOOD, "model=3") == ["command line: model: found 3; wanted text, or keys and values"]


def test_only_a_task_that_is_one_is_told_what_is_not_its_own(tmp_path: Path) -> None:
    assert len(mistakes(tmp_path, GOOD, "dpo.beta=0.3")) == 1
    assert "belongs to task dpo" in mistakes(tmp_path, GOOD, "dpo.beta=0.3")[0]
    assert mistakes(tmp_path, GOOD, "dpo.beta=0.3", "task=dop")[0].startswith("command line: task: 'dop' is not one of")


@pytest.mark.parametrize(("every", "told"), [("null", True), ("3", True), ("250", False), ("x", False), ("0", False)])
def test_the_best_checkpoints_need_a_loss_at_every_checkpoint(tmp_path: Path, every: str, told: bool) -> None:
    """What is no number of steps at all is told for itself."""
    overrides = ["save.keep_best=2", f"eval.every={every}"]
    found = "" if every == "250" else "\n".join(mistakes(tmp_path, GOOD, *overrides))
    assert ("save.keep_best needs" in found) == told


def test_decay_belongs_to_wsd_only(tmp_path: Path) -> None:
    assert "decay belongs to schedule wsd" in "\n".join(mistakes(tmp_path, GOOD, "optim.schedule=cosine"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.optimizer=muonn", ["'muonn' is not one of adamw, muon, adafactor, sgd", "did you mean 'muon'?"]),
        ("optim.momentum=0.9", ["belongs to `optimizer: muon` and `optimizer: sgd`"]),
        ("optim.warmup=100M tokns", ["or an amount such as 100M tokens"]),
        ("optim.warmup=many tokens", ["'many'; wanted a size"]),
        ("optim={optimizer: sgd, lr: 0.1, momentum: 0, nesterov: true}", ["nesterov looks ahead by the momentum"]),
        ("optim={optimizer: muon, lr: 0.1, beta: 0}", ["unknown key, did you mean 'betas'?"]),
    ],
)
def test_optimizers_refuse_what_is_not_theirs(tmp_path: Path, override: str, words: list[str]) -> None:
    found = "\n".join(mistakes(tmp_path, GOOD, override))
    assert all(word in found for word in words), found


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("train/*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_is_valid_and_short(path: Path) -> None:
    tasks = {"sft": "sft", "lora": "sft", "dpo": "dpo", "orpo": "orpo"}
    assert load_config(path, RunConfig).task == tasks.get(path.stem, "pretrain")
    assert len(path.read_text().splitlines()) <= 25


@pytest.mark.parametrize(
    ("run", "mix"),
    [
        ("quickstart", "quickstart"),
        ("pretrain", "pretrain"),
        ("sft", "sft"),
        ("lora", "sft"),
        ("dpo", "preference"),
        ("orpo", "preference"),
    ],
)
def test_a_shipped_config_trains_on_what_a_shipped_mix_makes(run: str, mix: str) -> None:
    made = load_config(CONFIGS / "mix" / f"{mix}.yaml", MixConfig)
    config = load_config(CONFIGS / "train" / f"{run}.yaml", RunConfig)
    assert (config.data, KINDS[config.task]) == (made.output, made.kind)
    assert config.batch.tokens % made.sequence.length == 0


def test_a_mistake_inside_a_model_is_named_by_its_keys(tmp_path: Path) -> None:
    assert mistakes(tmp_path, GOOD, "model.from_config={}")[0].startswith("command line: model.from_config: found {}")
