"""Thirty mistakes in one run.yaml: all are told at once, each with its line, before anything heavy is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmt_shared.config import load_config
from llmt_shared.errors import ConfigError
from llmt_train.config import RunConfig

MISTAKES = """\
task: stf                              # misspelt value
model: {from_confg: {}}                # misspelt key; the right one is not missing too
data:
  synthetic:
    length: 1                          # too small
    vocabsize: 100                     # misspelt key
output: [runs, x]                      # a list for a path
batch:
  tokens: 100 thousand                 # no size
  micro_row: 4                         # misspelt key
train:                                 # two keys that exclude each other
  epochs: 1
  steps: 100
  seed: -3                             # negative
  deterministic: maybe                 # neither true nor false
  checkpointing: {policy: selectiv}    # misspelt value
  freeze: ["embed("]                   # no regular expression; and useless beside lora
optim:
  lr: fast                             # wrong type
  min_lr: .inf                         # not finite
  schedule: cosin                      # misspelt value
  warmup: 300%                         # more than all
  decay: 10%                           # belongs to another schedule
  betas: [0.9, 1.5]                    # the second one is too large
  momentum: 0.9                        # belongs to other optimizers
lora: {rank: 0.5, targets: all-liner}  # a number of another kind; neither the one word nor a list
dpo: {label_smoothing: 0.6}            # too large
attention: flash                       # unknown
eval: {every: 100 steps}               # wrong type
save: {keep: 0}                        # too small
log: [wandb, tensorbord]               # misspelt item
wandb: {mode: offlin}                  # misspelt value
sample: {every: 10}                    # a key is missing; and synthetic rows have no tokenizer
"""

LINES = """\
run.yaml:1: task: 'stf' is not one of pretrain, sft, dpo, orpo, did you mean 'sft'?
run.yaml:2: model.from_confg: unknown key, did you mean 'from_config'?; known here: from_config
run.yaml:5: data.synthetic.length: found 1; wanted a number greater than 1
run.yaml:6: data.synthetic.vocabsize: unknown key, did you mean 'vocab_size'?; known here: held_out, length, median, rows, seed, sigma, targets, vocab_size
run.yaml:7: output: found ['runs', 'x']; wanted path
run.yaml:9: batch.tokens: found '100 thousand'; wanted a size, such as 20B, 300M or 4096
run.yaml:10: batch.micro_row: unknown key, did you mean 'micro_rows'?; known here: micro_rows, tokens
run.yaml:11: train: found both; wanted one of `epochs` and `steps`
run.yaml:14: train.seed: found -3; wanted a number greater than or equal to 0
run.yaml:15: train.deterministic: found 'maybe'; wanted true or false
run.yaml:16: train.checkpointing.policy: 'selectiv' is not one of none, attention, selective, full, did you mean 'selective'?
run.yaml:17: train.freeze.0: found 'embed(', which is no regular expression: missing ), unterminated subpattern at position 5
run.yaml:17: train.freeze has no use with lora, which freezes the whole model; remove it
run.yaml:19: optim.lr: found 'fast'; wanted a number
run.yaml:20: optim.min_lr: found inf; wanted a finite number
run.yaml:21: optim.schedule: 'cosin' is not one of constant, linear, cosine, wsd, did you mean 'cosine'?
run.yaml:22: optim.warmup: found '300%'; wanted a number of steps, a share of the run such as 3%, or an amount such as 100M tokens
run.yaml:23: optim: decay belongs to schedule wsd, not to cosin; remove `decay`
run.yaml:24: optim.betas.1: found 1.5; wanted a number less than 1
run.yaml:25: optim.momentum: belongs to `optimizer: muon` and `optimizer: sgd`; remove `momentum`, or choose that
run.yaml:26: lora.rank: found 0.5; wanted a whole number
run.yaml:26: lora.targets: found 'all-liner'; wanted all-linear or a list, did you mean 'all-linear'?
run.yaml:27: dpo.label_smoothing: found 0.6; wanted a number less than 0.5
run.yaml:28: attention: 'flash' is not one of auto, flash3, flash2, varlen, flex, sdpa, did you mean 'flash3'?
run.yaml:29: eval.every: found '100 steps'; wanted a whole number
run.yaml:30: save.keep: found 0; wanted a number greater than 0
run.yaml:31: log.1: 'tensorbord' is not one of jsonl, tensorboard, wandb, mlflow, did you mean 'tensorboard'?
run.yaml:32: wandb.mode: 'offlin' is not one of online, offline, did you mean 'offline'?
run.yaml:33: sample.prompts: missing; it is required
run.yaml:33: sample: synthetic rows have no tokenizer to read texts with; remove `sample`
"""  # noqa: E501  lines of the message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MISTAKES)
    return path


def test_all_are_told_at_once_each_with_its_line(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, RunConfig)
    assert str(caught.value).replace(f"{path.parent}/", "").splitlines() == LINES.splitlines()
    assert len(LINES.splitlines()) == 30


@pytest.mark.parametrize("command", ["fit", "check", "ref"])
def test_the_command_line_tells_them_before_it_loads_anything_heavy(path: Path, command: str) -> None:
    program = (
        "import atexit, sys\n"
        "from llmt_train.cli import main\n"
        "heavy = {'torch', 'lightning', 'transformers', 'numpy'}\n"
        "atexit.register(lambda: print('heavy:', *sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['llmt-train', '{command}', '--config', {str(path)!r}]\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.replace(f"{path.parent}/", "") == f"error: {LINES}heavy:\n"
