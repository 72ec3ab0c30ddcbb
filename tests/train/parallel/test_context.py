"""Two ranks that share every row, against one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from train.parallel.ranks import on_ranks
from train.plain import model_of
from train.rows import chat_rows, count, document_rows, pack, pair_rows
from train.steps import gradient_error, task_of
from train.tiny_models import packed, tiny

from llmt_shared.errors import ConfigError
from llmt_train.attention import Segments
from llmt_train.attention.transformers_hook import attend
from llmt_train.config import CheckpointingConfig
from llmt_train.data.batch import PackedBatch, shard_tokens
from llmt_train.model.head import find_head, model_scores
from llmt_train.model.isolation import check_isolation
from llmt_train.model.load import whole_logits
from llmt_train.model.recompute import recompute
from llmt_train.objectives import Measures, pair_logps, share
from llmt_train.parallel.context import TokenSplit, repeats
from llmt_train.parallel.mesh import Axis
from llmt_train.tasks import Task

TOLERANCE = 1e-5


class Job(NamedTuple):
    """A model and what it learns."""

    family: str
    task: str
    settings: Mapping[str, Any] = {}
    keys: Mapping[str, Any] = {}
    """Of the model's config."""
    policy: str = "none"
    """Of activation checkpointing."""


JOBS = [
    *(
        Job(family, *task)
        for family in ("llama", "phi3")
        for task in (
            ("pretrain",),
            ("sft",),
            ("dpo", {"reference": "file"}),
            ("orpo", {"nll_on": "response"}),
            ("orpo", {"nll_on": "all"}),
        )
    ),
    Job("llama", "pretrain", {"label_smoothing": 0.1, "z_loss": 1e-3}),
    Job("llama", "dpo", {"length_normalised": True, "label_smoothing": 0.2, "sft_weight": 0.5}),
    Job("llama", "dpo", {"loss": "ipo"}),
    Job("llama", "sft", keys={"num_key_value_heads": 1}),
    Job("llama", "sft", policy="selective"),
    Job("phi3", "sft", policy="full"),
    Job("gemma2", "sft"),
]
"""Phi-3 here has a window of 11 tokens, Gemma-2 one of 8 and a soft cap in its attention."""


def batch_of(job: Job) -> PackedBatch:
    """All rows of a step; the border of the two ranks lies inside a segment."""
    rows = {"pretrain": document_rows, "sft": chat_rows}.get(job.task, pair_rows)()
    batch = pack(
        rows,
        range(len(rows)),
        count(rows),
        all_targets=job.task == "pretrain",
        with_chosen_prompts=job.settings.get("nll_on") == "all",
        with_reference=job.settings.get("reference") == "file",
    )
    assert sum(batch.lengths) // 2 not in batch.cu_seqlens.tolist()
    return batch


class Result(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]
    measures: dict[str, Tensor]
    """[parts, P, 2] values and counts, by piece."""


def result_of(model: Any, task: Task, batch: PackedBatch) -> Result:
    """Of this rank alone."""
    model.zero_grad()
    keywords = {"with_mean": task.with_mean, "is_uniform": task.is_uniform}
    measures = task.objective(model_scores(model, find_head(model), batch, **keywords), batch)
    loss = share(measures["loss"], batch.denominators)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return Result(loss.detach(), gradients, by_piece(measures, len(batch.lengths)))


def by_piece(measures: Measures, num_pieces: int) -> dict[str, Tensor]:
    def sums(part) -> Tensor:
        both = torch.stack([part.values, part.counts], dim=1).detach().double()
        return torch.zeros(num_pieces, 2, dtype=torch.float64).index_add_(0, part.piece, both)

    return {name: torch.stack([sums(part) for part in parts]) for name, parts in measures.items()}


def cp() -> Axis:
    return Axis(dist.group.WORLD, dist.get_world_size(), dist.get_rank())


def added_up(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


class Errors(NamedTuple):
    loss: float
    gradient: float
    measures: dict[str, float]


def errors() -> list[Errors]:
    return [errors_of(job) for job in JOBS]


def errors_of(job: Job) -> Errors:
    model = tiny(job.family, initializer_range=0.2, **job.keys)
    settings = {name: value for name, value in job.settings.items() if name != "reference"}
    task, batch = task_of(job.task, settings), batch_of(job)
    wanted = result_of(model, task, batch)
    recompute(model, CheckpointingConfig(policy=job.policy))
    part = result_of(model, task, shard_tokens(batch, TokenSplit(cp=cp())))
    loss = added_up(part.loss)
    gradients = {name: added_up(gradient) for name, gradient in part.gradients.items()}
    measures = {name: added_up(sums) for name, sums in part.measures.items()}
    assert measures.keys() == wanted.measures.keys()
    return Errors(
        abs(loss / wanted.loss - 1).item(),
        gradient_error(gradients, wanted.gradients),
        {name: relative(sums, wanted.measures[name]) for name, sums in measures.items()},
    )


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


@pytest.fixture(scope="module")
def found() -> list[list[Errors]]:
    return on_ranks(2, errors)


each_job = pytest.mark.parametrize("index", range(len(JOBS)), ids=[str(tuple(job)) for job in JOBS])


@each_job
def test_loss_and_every_gradient_add_up_to_those_of_one_rank(found, index):
    for of_rank in found:
        assert of_rank[index].loss <= TOLERANCE
        assert of_rank[index].gradient <= TOLERANCE


@each_job
def test_every_measure_adds_up_to_that_of_one_rank_piece_by_piece(found, index):
    for of_rank in found:
        for name, error in of_rank[index].measures.items():
            assert error <= TOLERANCE, name


def errors_of_one_segment() -> float:
    batch, model, task = packed([[40]], 40), model_of("llama", torch.float32), task_of("pretrain", {})
    wanted = result_of(model, task, batch).gradients
    part = result_of(model, task, shard_tokens(batch, TokenSplit(cp=cp()))).gradients
    return gradient_error({name: added_up(gradient) for name, gradient in part.items()}, wanted)


def test_one_document_may_be_as_long_as_all_ranks_tokens():
    assert all(error <= TOLERANCE for error in on_ranks(2, errors_of_one_segment))


def zeros_of_padding() -> bool:
    batch, model, task = packed([[]], 16, targets=5.0), model_of("llama", torch.float32), task_of("pretrain", {})
    result = result_of(model, task, shard_tokens(batch, TokenSplit(cp=cp())))
    return not any(x.any() for x in (result.loss, *result.gradients.values()))


def test_padding_gives_zero_to_every_parameter():
    assert all(on_ranks(2, zeros_of_padding))


def pair_sums() -> float:
    rows, model = pair_rows(), model_of("llama", torch.float32)
    batch, head = pack(rows, range(len(rows)), count(rows)), find_head(model)
    wanted = pair_logps(model_scores(model, head, batch), batch)
    shared = shard_tokens(batch, TokenSplit(cp=cp()))
    return relative(pair_logps(model_scores(model, head, shared), shared), wanted)


def test_the_reference_is_the_same_on_every_rank():
    assert all(error <= TOLERANCE for error in on_ranks(2, pair_sums))


class Layer(nn.Module):
    is_causal = True


def head_errors(num_heads: int, kv_heads: int) -> float:
    """[N, heads, size] through `attend`, whole and by this rank's tokens; the sinks are a parameter of all heads."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 20, 8, generator=generator, dtype=torch.float64)
        for heads in (num_heads, kv_heads, kv_heads)
    )
    weights, sinks = (
        torch.randn(20, num_heads, 8, generator=generator).double(),
        torch.randn(num_heads, generator=generator).double(),
    )
    own, whole = slice(10 * cp().rank, 10 * cp().rank + 10), Segments.from_lengths([3, 9, 8])
    shared = Segments(whole.lengths, whole.cu_seqlens, whole.ids, whole.max_length, cp=cp())
    wanted_sinks, got_sinks = (sinks.clone().requires_grad_() for _ in range(2))
    wanted, _ = attend(Layer(), q, k, v, segments=whole, s_aux=wanted_sinks)
    (wanted[0] * weights).sum().backward()
    got, _ = attend(Layer(), *(x[:, :, own] for x in (q, k, v)), segments=shared, s_aux=got_sinks)
    (got[0] * weights[own]).sum().backward()
    errors = [relative(got, wanted[:, own]), relative(added_up(got_sinks.grad), wanted_sinks.grad)]
    return torch.tensor(errors, dtype=torch.float64).max().item()  # a NaN stays one


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(4, 2), (12, 3)])
def test_what_belongs_to_a_head_goes_with_it(num_heads, kv_heads):
    """3 key heads on 2 ranks are there twice each."""
    assert all(error <= 1e-12 for error in on_ranks(2, head_errors, num_heads, kv_heads))


def logit_errors() -> tuple[float, str]:
    model, split = model_of("phi3", torch.float32).eval(), TokenSplit(cp=cp())
    texts = [[5, 6, 7], [9] * 14, [4, 3]]
    error = relative(whole_logits(model, texts, split=split), whole_logits(model, texts))
    check_isolation(model, split=split)
    try:
        check_isolation(tiny("falcon"), split=split)
    except ConfigError as refusal:
        return error, str(refusal)
    return error, ""


def test_a_model_is_asked_about_any_number_of_tokens_and_leaks_are_seen():
    for error, refusal in on_ranks(2, logit_errors):
        assert error <= TOLERANCE
        assert "falcon" in refusal


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "wanted"),
    [
        (8, 8, 2, 1),
        (8, 2, 2, 1),
        (8, 2, 4, 2),
        (8, 1, 4, 4),
        (8, 2, 8, 4),
        (12, 3, 2, 2),
        (12, 4, 3, 3),
        (32, 8, 16, 2),
    ],
)
def test_key_heads_are_repeated_as_often_as_needed(heads, kv_heads, size, wanted):
    assert repeats(heads, kv_heads, size) == wanted


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"parallel.cp: 3 does not divide the 8 attention heads"):
        repeats(8, 2, 3)
