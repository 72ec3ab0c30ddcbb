"""Layers shared out over ranks compute what they compute in one process: loss, gradients of every parameter, norms."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from train.parallel.ranks import on_ranks
from train.parallel.shared_out import (
    CASES,
    VOCAB,
    Job,
    Step,
    batch_of,
    build,
    logits_of,
    share_out,
    step_alone,
    steps_shared,
)
from train.steps import gradient_error
from train.tiny_models import CONFIGS, tiny

from llmt_shared.errors import ConfigError
from llmt_train.model import compilation
from llmt_train.model.compilation import compile_layers
from llmt_train.model.fused import split_fused
from llmt_train.model.load import load_skeleton
from llmt_train.model.neftune import noisy_embeddings
from llmt_train.model.recompute import layers_of
from llmt_train.parallel.collectives import enter
from llmt_train.parallel.layout import Layout, place_of
from llmt_train.parallel.mesh import ALONE, Axis, Mesh, build_mesh
from llmt_train.parallel.tensor import tensor_parallel

TP2, DP2_TP2 = Layout(1, 1, 1, 2), Layout(1, 2, 1, 2)
IN_FULL = ("llama", "phi3")
POLICIES = ("selective", "attention", "full")
JOBS = {
    TP2: [
        *[Job(case, True) for case in CASES],
        *[Job(case, False) for case in (*IN_FULL, "llama with biases", "llama of 97 tokens", "qwen3", "olmo2")],
        *[Job(case, True, policy) for case in IN_FULL for policy in POLICIES],
    ],
    DP2_TP2: [Job(case, sp) for case in IN_FULL for sp in (True, False)],
}
REST = [Job(case, sp) for case in CASES if case not in IN_FULL for sp in (True, False)]
TOLERANCE = 1e-5


def title(job: Job) -> str:
    return f"{job.case}, {'sp' if job.sp else 'whole tokens'}{f', {job.policy}' if job.policy else ''}"


@cache
def shared(layout: Layout, is_rest: bool = False) -> list[dict[Job, Step]]:
    """[rank]; one launch for all jobs of a layout."""
    return on_ranks(layout.world, steps_shared, REST if is_rest else JOBS[layout], layout)


@cache
def alone(case: str, num_batches: int) -> Step:
    return step_alone(case, num_batches)


def check(found: list[dict[Job, Step]], job: Job, layout: Layout) -> None:
    steps, wanted = [of_rank[job] for of_rank in found], alone(job.case, layout.dp)
    loss = sum(step.loss for step in steps) / layout.world
    assert abs(loss - wanted.loss) <= TOLERANCE * abs(wanted.loss)
    for step in steps:
        assert set(step.gradients) == set(wanted.gradients)
        assert gradient_error(step.gradients, wanted.gradients) <= TOLERANCE
        assert abs(step.norm - wanted.norm) <= TOLERANCE * wanted.norm


@pytest.mark.parametrize("job", JOBS[TP2], ids=title)
def test_two_ranks_that_share_layers_are_one(job: Job):
    check(shared(TP2), job, TP2)


@pytest.mark.parametrize("job", JOBS[DP2_TP2], ids=title)
def test_two_pairs_of_ranks_that_read_different_rows_are_one(job: Job):
    check(shared(DP2_TP2), job, DP2_TP2)


@pytest.mark.slow
@pytest.mark.parametrize("job", REST, ids=title)
def test_two_pairs_of_ranks_are_one_for_the_other_families(job: Job):
    check(shared(DP2_TP2, is_rest=True), job, DP2_TP2)


def test_measures_see_a_wrong_gradient():
    """A factor, or nothing, for any one parameter: the suite would notice."""
    wanted = alone("llama", 1).gradients
    for name in wanted:
        for factor in (2.0, 0.0):
            assert gradient_error({**wanted, name: factor * wanted[name]}, wanted) > 100 * TOLERANCE


# What each rank holds and computes.

_SHARED_OUT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _costs(case: str, layout: Layout) -> dict[str, tuple[int, int]]:
    """Bytes and FLOPs, forward and backward, of the layers of a kind."""
    model, _ = share_out(case, layout, sp=True)
    with FlopCounterMode(display=False) as counter:
        logits_of(model, batch_of(0, model.config.vocab_size)).sum().backward()
    counted = counter.get_flop_counts()
    costs = {}
    for kind in (*_SHARED_OUT, "embed_tokens", "lm_head"):
        modules = {name: module for name, module in model.named_modules() if name.endswith(kind)}
        size = sum(p.to_local().nbytes for module in modules.values() for p in module.parameters())
        places = [place for place in counted if place.endswith(kind)]
        assert len(places) == (0 if kind == "embed_tokens" else len(modules))
        costs[kind] = (size, sum(sum(counted[place].values()) for place in places))
    return costs


@pytest.mark.parametrize("case", ["phi3", "phi4-mini"])
def test_each_rank_has_half_of_the_bytes_and_the_arithmetic(case: str):
    (whole,) = on_ranks(1, _costs, case, Layout())
    assert all(flops > 0 for kind, (_, flops) in whole.items() if kind != "embed_tokens")
    for found in on_ranks(2, _costs, case, TP2):
        assert {kind: (2 * size, 2 * flops) for kind, (size, flops) in found.items()} == whole


def _between_layers(sp: bool) -> list[tuple[int, ...]]:
    """Shapes of what layers hand on, and of what the decoder gives."""
    model, _ = share_out("llama", TP2, sp)
    shapes: list[tuple[int, ...]] = []
    for layer in layers_of(model, ""):
        layer.register_forward_hook(lambda _layer, _arguments, output: shapes.append(tuple(output.shape)))
    model.get_decoder().register_forward_hook(
        lambda _decoder, _arguments, output: shapes.append(tuple(output.last_hidden_state.shape))
    )
    logits_of(model, batch_of(0, model.config.vocab_size))
    return shapes


@pytest.mark.parametrize(("sp", "tokens"), [(True, 14), (False, 28)])
def test_with_sequence_parallel_a_rank_holds_its_own_tokens_between_layers(sp: bool, tokens: int):
    assert on_ranks(2, _between_layers, sp) == [[(1, tokens, 64)] * 3] * 2


# What goes on around the layers.


def _kept_logits(kept: Any) -> Tensor:
    model, _ = share_out("gemma2", TP2, sp=True)
    with torch.no_grad():
        return logits_of(model, batch_of(0, model.config.vocab_size), logits_to_keep=kept)


@pytest.mark.parametrize("kept", [0, 5, torch.tensor([0, 13, 14, 27])], ids=["all", "last", "places"])
def test_the_models_own_logits_of_some_tokens_are_those_of_one_process(kept: Any):
    model = build("gemma2")
    with torch.no_grad():
        wanted = logits_of(model, batch_of(0, model.config.vocab_size), logits_to_keep=kept)
    for found in on_ranks(2, _kept_logits, kept):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def _through_the_head(sp: bool, is_shared: bool) -> tuple[Tensor, Tensor]:
    """A loss of hidden states that enter an output layer, which is shared out or whole; their whole gradient."""
    axis = build_mesh(TP2, "cpu").tp
    hidden, weight = _hidden_and_weight()
    own = (hidden.chunk(2)[axis.rank] if sp else hidden).clone().requires_grad_()
    rows = weight.chunk(2)[axis.rank] if is_shared else weight
    whole = enter(own, axis, sp, is_shared=is_shared)
    (F.linear(whole, rows).sin().sum()).backward()
    assert own.grad is not None
    return whole.detach(), own.grad


def _hidden_and_weight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, generator=generator), torch.randn(8, 4, generator=generator)


@pytest.mark.parametrize("sp", [True, False])
@pytest.mark.parametrize("is_shared", [True, False])
def test_hidden_states_enter_the_head_whole_and_get_the_whole_gradient(sp: bool, is_shared: bool):
    hidden, weight = _hidden_and_weight()
    hidden.requires_grad_()
    F.linear(hidden, weight).sin().sum().backward()
    for rank, (whole, gradient) in enumerate(on_ranks(2, _through_the_head, sp, is_shared)):
        assert torch.equal(whole, hidden)
        wanted = hidden.grad.chunk(2)[rank] if sp else hidden.grad
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-6)


def _noisy(layout: Layout) -> Tensor:
    model, _ = share_out("llama", layout, sp=True)
    return _noisy_logits(model)


def _noisy_logits(model: nn.Module) -> Tensor:
    batch = batch_of(0, 96)._replace(row_places=(3,))
    with torch.no_grad(), noisy_embeddings(model, batch, alpha=10.0, seed=5):
        return logits_of(model, batch)


def test_noise_on_embeddings_is_that_of_one_process():
    model = build("llama")
    wanted = _noisy_logits(model)
    assert not torch.allclose(wanted, logits_of(model, batch_of(0, 96)), atol=1e-2)
    for found in on_ranks(2, _noisy, TP2):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def _gradients(model: Any) -> dict[str, Tensor]:
    logits_of(model, batch_of(0, model.config.vocab_size)).square().sum().backward()
    return {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}


def _without_fsdp(case: str) -> Any:
    model = build(case)
    split_fused(model)
    tensor_parallel(model, build_mesh(TP2, "cpu"), sp=True)
    return model


def _of_a_copy(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = _without_fsdp(case)
    twin = copy.deepcopy(model)
    wanted = _gradients(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return _gradients(twin), wanted


@pytest.mark.parametrize("case", IN_FULL)
def test_a_copy_computes_with_weights_of_its_own(case: str):
    for found, wanted in on_ranks(2, _of_a_copy, case):
        assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def _compiled() -> list[tuple[dict[str, Tensor], dict[str, Tensor], int]]:
    # What a compiler traces, without the minutes that making code of it takes.
    compile_with = torch.compile
    compilation.torch.compile = lambda function, **options: compile_with(function, backend="eager", **options)
    answers = []
    for case in IN_FULL:
        model, twin = _without_fsdp(case), _without_fsdp(case)
        compile_layers(model)
        counters.clear()
        answers.append((_gradients(model), _gradients(twin), counters["stats"]["unique_graphs"]))
    return answers


def test_layers_compile():
    for of_rank in on_ranks(2, _compiled):
        for found, wanted, graphs in of_rank:
            assert graphs > 0
            assert gradient_error(found, wanted) <= TOLERANCE


def _lies(case: str) -> list[dict[str, Any]]:
    """How parameters lie, without weights and with them."""
    keys = {**CONFIGS[CASES[case]["model_type"]], "vocab_size": VOCAB, **CASES[case]}
    skeleton = load_skeleton({"from_config": keys})
    split_fused(skeleton)
    tensor_parallel(skeleton, build_mesh(TP2, "cpu"), sp=True)
    assert all(p.is_meta for p in skeleton.parameters())
    return [
        {name: (p.placements, p.shape, p.stride(), p.to_local().shape) for name, p in model.named_parameters()}
        for model in (skeleton, _without_fsdp(case))
    ]


@pytest.mark.parametrize("case", ["phi4-mini", "olmo2"])
def test_parameters_without_weights_lie_as_those_with_them(case: str):
    for found, wanted in on_ranks(2, _lies, case):
        assert found == wanted


def _tied() -> bool:
    model, _ = share_out("llama tied", TP2, sp=True)
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_tied_weights_stay_tied():
    assert all(on_ranks(2, _tied))


def _in_bf16(layout: Layout) -> tuple[torch.dtype, dict[str, Tensor]]:
    model, _ = share_out("llama with biases", layout, sp=True, compute=torch.bfloat16)
    logits = logits_of(model, batch_of(0, VOCAB))
    F.cross_entropy(logits.float(), batch_of(0, VOCAB).labels[0]).backward()
    return logits.dtype, {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}


def test_weights_in_fp32_compute_in_bf16():
    """With no more noise than in one process: gradients that are summed over ranks are summed in fp32."""
    wanted = alone("llama with biases", 1).gradients
    noise = gradient_error(on_ranks(1, _in_bf16, Layout())[0][1], wanted)
    for dtype, gradients in on_ranks(2, _in_bf16, TP2):
        assert dtype == torch.bfloat16
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        assert gradient_error(gradients, wanted) <= 2 * noise < 0.5


# What cannot be shared out.


def _with_a_strange_layer() -> None:
    model = build("llama")
    layers_of(model, "")[1].gate = nn.Linear(64, 2)
    tensor_parallel(model, build_mesh(TP2, "cpu"), sp=True)


def _with_other_names() -> None:
    tensor_parallel(build("phi3"), build_mesh(TP2, "cpu"), sp=True)  # not split


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_with_a_strange_layer, r"does not know model.layers.1.gate \(Linear\); set `parallel: {tp: 1}`"),
        (_with_other_names, "phi3 has no self_attn.q_proj in its Phi3DecoderLayer"),
    ],
)
def test_a_model_that_the_plan_does_not_know_is_refused(function: Any, message: str):
    with pytest.raises(AssertionError, match=f"(?s)rank 0.*ConfigError: .*{message}"):
        on_ranks(2, function)


def test_alone_there_is_nothing_to_share():
    model = tiny("gpt2")
    tensor_parallel(model, Mesh(Layout(), place_of(Layout(), 0), None, ALONE, ALONE, ALONE, ALONE), sp=True)
    assert not any(isinstance(p, DTensor) for p in model.parameters())


def test_a_model_without_a_plan_is_refused_and_left_as_it_is():
    model, axis = tiny("gpt2"), Axis(None, 2, 0)
    with pytest.raises(ConfigError, match="gpt2 has no plan"):
        tensor_parallel(model, Mesh(TP2, place_of(TP2, 0), None, axis, ALONE, ALONE, ALONE), sp=True)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
