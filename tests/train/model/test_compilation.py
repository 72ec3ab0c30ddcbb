"""Compiled layers compute what they computed, for any segments, from one piece of code."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from train.tiny_dataset import write_dataset
from train.tiny_models import packed, tiny

from llmt_train.config import CheckpointingConfig, RunConfig
from llmt_train.fit import fit
from llmt_train.model import compilation
from llmt_train.model.compilation import compile_layers
from llmt_train.model.recompute import recompute
from llmt_train.watch.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

ROWS = [[[20, 4], [7]], [[3, 4, 5], [7, 9]], [[24], [7, 2]], [[1, 23], [24]]]


@pytest.fixture
def eager_backend(monkeypatch):
    """What a compiler traces, without the minutes that making code of it takes."""
    compile_with = torch.compile
    monkeypatch.setattr(
        compilation.torch, "compile", lambda function, **options: compile_with(function, backend="eager", **options)
    )
    torch._dynamo.reset()
    counters.clear()


def backward(model, rows):
    batch = packed(rows, 24)
    model.zero_grad()
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments()).logits
    torch.nn.functional.cross_entropy(logits[0], batch.labels[0]).backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.usefixtures("eager_backend")
@pytest.mark.parametrize("policy", ["none", "attention", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_segments_need_no_other_code(family, policy):
    plain, compiled = tiny(family), tiny(family)
    compile_layers(compiled)
    recompute(compiled, CheckpointingConfig(policy=policy))
    backward(compiled, ROWS[0])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for rows in ROWS:
        (logits, gradients), (found, recomputed) = backward(plain, rows), backward(compiled, rows)
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-6)
        for a, b in zip(recomputed, gradients, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_run_with_code_made_for_this_machine_has_the_same_curve(tmp_path: Path, checkpointing) -> None:
    data = write_dataset(tmp_path / "data")
    model = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    for compiled in (False, True):
        fit(RunConfig.model_validate({
            "task": "pretrain", "model": {"from_config": model}, "data": data, "output": tmp_path / str(compiled),
            "batch": {"tokens": 80, "micro_rows": 2}, "optim": {"lr": 1e-2},
            "train": {"steps": 6, "compile": compiled, "checkpointing": checkpointing},
        }))  # fmt: skip
    plain, compiled = ([r["loss"] for r in read_metrics(tmp_path / str(x)) if "loss" in r] for x in (False, True))
    assert compiled == pytest.approx(plain, rel=1e-5)
