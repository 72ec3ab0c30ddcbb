"""What a rank is said to hold of a model that is laid out over devices is what it holds when it is there."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from train.check.one_step import Found, Step, on_real_ranks, with_numbers, without_numbers
from train.parallel.ranks import on_ranks
from train.tiny_models import CONFIGS, packed

from llmt_train.check.dryrun import cpu_attention, laid_out_copy, micro_batch, optimizer_step, warm_up
from llmt_train.check.livebytes import LiveBytes
from llmt_train.check.pretend import as_rank
from llmt_train.config import AdafactorConfig, AdamwConfig, MuonConfig, SgdConfig
from llmt_train.model.head import likely_head, model_scores
from llmt_train.model.load import load_skeleton
from llmt_train.objectives import clm
from llmt_train.optim import build_optimizer
from llmt_train.parallel.layout import Layout
from llmt_train.parallel.mesh import Mesh
from llmt_train.tasks import Task

BF16 = torch.bfloat16
ALONE = {
    "fp32": Step(),
    "bf16": Step(compute=BF16),
    "bf16, selective": Step(compute=BF16, policy="selective"),
    "bf16, attention": Step(compute=BF16, policy="attention"),
    "bf16, full": Step(compute=BF16, policy="full"),
    "bf16, once a step": Step(compute=BF16, exchanges_once=True),
    "bf16, own logits": Step(compute=BF16, has_head=False, task=Task(clm, clm)),
    "muon": Step(optimizer=MuonConfig(lr=1e-3, optimizer="muon")),
    "adafactor": Step(optimizer=AdafactorConfig(lr=1e-3, optimizer="adafactor")),
    "sgd": Step(optimizer=SgdConfig(lr=1e-3, optimizer="sgd")),
    "tied": Step(compute=BF16, keys=(("tie_word_embeddings", True),)),
    "gpt2": Step(compute=BF16, family="gpt2"),
}
TOGETHER = {
    "shard": Step(Layout(shard=2), compute=BF16),
    "shard, once a step": Step(Layout(shard=2), compute=BF16, exchanges_once=True),
    "replicate": Step(Layout(replicate=2)),
    "tp, sp": Step(Layout(tp=2), keys=(("vocab_size", 98),)),
    "tp, sp, bf16, full": Step(Layout(tp=2), compute=BF16, policy="full", keys=(("vocab_size", 98),)),
    "tp, vocabulary not shared": Step(Layout(tp=2), sp=False),
    "phi3, tp": Step(Layout(tp=2), family="phi3"),
    "cp": Step(Layout(cp=2), compute=BF16),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    return dict(zip(ALONE, on_ranks(1, on_real_ranks, list(ALONE.values()))[0], strict=True))


@pytest.mark.parametrize("name", ALONE)
def test_one_rank_holds_what_it_holds_with_numbers(alone, name):
    assert without_numbers(ALONE[name]) == alone[name]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", TOGETHER)
def test_a_rank_of_two_holds_what_it_holds_with_numbers(name, rank):
    step = TOGETHER[name]
    assert without_numbers(step, rank) == as_rank(step.layout, rank, partial(with_numbers, step))


def test_ranks_that_are_there_hold_that_much():
    """Gloo sums up in a copy, a layer's gradients here, and keeps what it sends a moment longer; NCCL does neither."""
    for rank, found in enumerate(on_ranks(2, on_real_ranks, list(TOGETHER.values()))):
        for real, step in zip(found, TOGETHER.values(), strict=True):
            dry = without_numbers(step, rank)
            assert (dry.parameters, dry.update) == (real.parameters, real.update)
            assert dry.peaks.total <= real.peaks.total <= 1.1 * dry.peaks.total


def num_parameters(layers: int = 2, vocabulary: int = 97) -> int:
    """Of the tiny Llama, by hand."""
    h, f, heads_kv, D = 64, 96, 2, 16
    return 2 * vocabulary * h + layers * (2 * h * h + 2 * h * heads_kv * D + 3 * h * f + 2 * h) + h


EVEN = (("vocab_size", 96),)


@pytest.mark.parametrize(
    ("layout", "parts"), [(Layout(shard=4), 4), (Layout(replicate=2, shard=2), 2), (Layout(shard=2, cp=2), 4)]
)
def test_parts_of_parameters_and_state_are_counted_by_hand(layout, parts):
    found = without_numbers(Step(layout, keys=EVEN))
    assert found.parameters == 4 * num_parameters(vocabulary=96) / parts
    assert found.update.state == pytest.approx(8 * num_parameters(vocabulary=96) / parts, rel=1e-3)


def test_tp_shares_matrices_alone():
    found = without_numbers(Step(Layout(tp=2), keys=EVEN))
    norms = (2 * 2 + 1) * 64
    assert found.parameters == 4 * ((num_parameters(vocabulary=96) - norms) / 2 + norms)


@pytest.mark.parametrize("compute", [None, BF16])
def test_what_lies_outside_the_layers_is_whole(compute):
    size = 4 if compute is None else 2
    assert without_numbers(Step(Layout(shard=4), compute=compute, keys=EVEN)).whole == size * (2 * 96 * 64 + 64)


@pytest.mark.parametrize("layout", [Layout(), Layout(shard=4)])
def test_what_lies_outside_the_layers_of_a_reference_does_not_stay_whole(layout):
    """Its forward pass has no backward pass that would take it apart."""
    assert as_rank(layout, 0, _left_after_forward) == 0


def _left_after_forward(mesh: Mesh) -> int:
    batch, skeleton = packed([[64]], 64), load_skeleton(Step(keys=EVEN).spec)
    with laid_out_copy(skeleton, batch, mesh, sp=False, compute=BF16) as (model, fake_batch), torch.no_grad():
        warm_up(model)
        with LiveBytes() as counter:
            model_scores(model, likely_head(model), fake_batch, attention=cpu_attention)
            return counter.now.exchanged


def kept(layout: Layout, layers: int, **more) -> int:
    keys = (*EVEN, ("num_hidden_layers", layers))
    return without_numbers(Step(layout, keys=keys, **more)).peaks.kept


@pytest.mark.parametrize(
    ("layout", "sp", "elements"),
    [
        # As test_dryrun counts them for one device.
        (Layout(), True, lambda N, h, f, H, K, D: N * (6 * h + 2 + 3 * H * D + 2 * K * D + H + 4 * f)),
        (Layout(shard=2), True, lambda N, h, f, H, K, D: N * (6 * h + 2 + 3 * H * D + 2 * K * D + H + 4 * f)),
        # Half of the tokens, of everything.
        (Layout(cp=2), True, lambda N, h, f, H, K, D: N / 2 * (6 * h + 2 + 3 * H * D + 2 * K * D + H + 4 * f)),
        # Half of the heads and of the MLP.
        (Layout(tp=2), False, lambda N, h, f, H, K, D: N * (6 * h + 2 + (3 * H * D + 2 * K * D + H + 4 * f) / 2)),
        # And half of the tokens, but for what attention and MLP read: 2 h.
        (
            Layout(tp=2),
            True,
            lambda N, h, f, H, K, D: N * ((4 * h + 2) / 2 + 2 * h + (3 * H * D + 2 * K * D + H + 4 * f) / 2),
        ),
    ],
)
def test_a_layer_of_a_rank_keeps_what_is_counted_by_hand(layout, sp, elements):
    found = kept(layout, 3, sp=sp) - kept(layout, 2, sp=sp)
    assert found == 4 * elements(N=128, h=64, f=96, H=4, K=2, D=16)


def test_logits_are_shared_by_tp():
    one, two = (
        without_numbers(Step(layout, keys=(("vocab_size", 4096),))).peaks for layout in (Layout(), Layout(tp=2))
    )
    assert two.head == pytest.approx(one.head / 2, rel=0.05)


def test_gradients_that_are_exchanged_once_wait_whole_in_fp32():
    found = without_numbers(Step(Layout(shard=4), compute=BF16, exchanges_once=True)).peaks
    assert found.waiting == 4 * num_parameters()
    assert without_numbers(Step(Layout(shard=4), compute=BF16)).peaks.waiting == 0


LARGE = {
    **CONFIGS["llama"],
    "vocab_size": 4096,
    "hidden_size": 96,
    "head_dim": 24,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "max_position_embeddings": 8192,
}
PROCESS = """
import json, sys
from functools import partial
import torch
from train.tiny_models import packed
from llmt_train.config import AdamwConfig, ParallelConfig
from llmt_train.model.head import find_head, model_scores
from llmt_train.model.load import load_model
from llmt_train.optim import build_optimizer
from llmt_train.parallel.mesh import open_mesh
from llmt_train.parallel.process import joined
from llmt_train.parallel.sharding import shard

torch.set_num_threads(1)
model_type, keys = sys.argv[1], json.loads(sys.argv[2])
group = joined(ParallelConfig())
group.__enter__()
mesh = open_mesh(ParallelConfig())

def step(tokens, **more):
    model = load_model({"from_config": {"model_type": model_type, **keys, **more}})
    shard(model, mesh)
    optimizer = build_optimizer(model, AdamwConfig(lr=1e-3))
    head, batch = find_head(model), packed([[64] * (tokens // 64)], tokens)
    for _ in range(2):  # gradients and state are there in the second one
        (-model_scores(model, head, batch, is_uniform=True).logps.sum()).backward()
        optimizer.step()

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

step(64, num_hidden_layers=1)  # loads what is loaded once
before = memory("VmRSS")
step(8192)
print(memory("VmHWM") - before)  # not ru_maxrss, which a process inherits from the one that started it
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory a process had")
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_a_process_grows_by_what_is_estimated(family, monkeypatch):
    """Of blocks that go back to the system when they are free: what an allocator keeps for later is not counted."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=":")
    command = [sys.executable, "-c", PROCESS, family, json.dumps(LARGE)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = as_rank(Layout(), 0, partial(estimated, family=family))
    assert found == pytest.approx(int(result.stdout), rel=0.05)


def estimated(mesh, family: str) -> int:
    skeleton, batch = load_skeleton({"from_config": {"model_type": family, **LARGE}}), packed([[64] * 128], 8192)
    task = Task(clm, clm, is_uniform=True)
    with laid_out_copy(skeleton, batch, mesh, sp=False) as (fake, fake_batch):
        update = optimizer_step(fake, partial(build_optimizer, config=AdamwConfig(lr=1e-3)))
        peaks = micro_batch(fake, likely_head(fake), task, fake_batch, attention=cpu_attention)
    return 2 * sum(4 * parameter.numel() for parameter in skeleton.parameters()) + update.state + peaks.total
