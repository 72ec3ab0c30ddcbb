"""The head whose vocabulary is shared by two ranks, against all logits at once on one."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from train.parallel.ranks import on_ranks
from train.tiny_models import packed, tiny

from llmt_shared.segments import IGNORE
from llmt_train.model.head import HeadSpec, check_head, find_head, logits_at, model_scores, token_scores
from llmt_train.model.scores import logits_of
from llmt_train.parallel.collectives import copy_in, gather, gather_same, split
from llmt_train.parallel.context import TokenSplit
from llmt_train.parallel.mesh import ALONE, Axis

N, H, V = 24, 12, 38


class Case(NamedTuple):
    """A head and a loss of its scores."""

    scale: float = 1.0
    softcap: float | None = None
    bias: bool = True
    labels: str = "any"
    """Of which part of the vocabulary: ``any``, ``first`` half, ``last`` half; ``none`` has no labels."""
    chunk: int = 7
    sp: bool = False
    weigh: str = "all"
    """What the loss reads: ``logps``, ``lse``, ``mean`` or ``all``; ``early`` is the plain sum of the logps."""
    vocabulary: int = V
    dtype: torch.dtype = torch.float64


CASES = [
    *(Case(weigh=weigh, sp=sp) for weigh in ("logps", "lse", "mean", "all", "early") for sp in (False, True)),
    *(Case(scale=0.5, softcap=2.0, weigh=weigh) for weigh in ("logps", "lse", "mean", "all", "early")),
    *(Case(scale=scale, softcap=softcap) for scale, softcap in ((0.125, None), (1.0, 3.0))),
    *(Case(labels=labels, weigh=weigh, sp=True) for labels in ("first", "last", "none") for weigh in ("all", "early")),
    *(Case(chunk=chunk, bias=False, weigh=weigh) for chunk in (1, 1000) for weigh in ("all", "early")),
    *(Case(vocabulary=37, sp=sp, weigh=weigh) for sp in (False, True) for weigh in ("all", "early")),
    *(Case(softcap=3.0, weigh=weigh, dtype=torch.float32) for weigh in ("all", "early")),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


class Problem(NamedTuple):
    """The same on every rank."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor


def problem_of(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(size, generator=generator) for size in ((N, H), (case.vocabulary, H), (V,)))
    first, last = {"first": (0, V // 2), "last": (V // 2, V)}.get(case.labels, (0, case.vocabulary))
    labels = torch.randint(first, last, (N,), generator=generator)
    labels[torch.randperm(N, generator=generator)[: N if case.labels == "none" else N // 3]] = IGNORE
    bias = bias[: case.vocabulary] if case.bias else None
    leaves = [None if x is None else x.to(case.dtype).requires_grad_() for x in (hidden, weight, bias)]
    return Problem(*leaves, labels)


def loss_of(scores, case: Case) -> Tensor:
    """Weighs tokens unequally, but for ``early``."""
    logps, lse, mean = scores
    if case.weigh == "early":
        return -0.37 * logps.sum()
    upstream = torch.linspace(-2, 3, N, dtype=logps.dtype)
    parts = {"logps": logps, "lse": 0.1 * lse**2, "mean": mean}
    return sum((upstream * part).sum() for name, part in parts.items() if case.weigh in (name, "all"))


def all_at_once(problem: Problem, case: Case) -> list[Tensor]:
    """Scores and gradients by autograd."""
    logits = F.linear(problem.hidden, problem.weight, problem.bias) * case.scale
    logits = case.softcap * torch.tanh(logits / case.softcap) if case.softcap else logits
    logps = logits.log_softmax(-1)
    picked = logps.gather(1, problem.labels.clamp(min=0)[:, None])[:, 0]
    scores = [torch.where(problem.labels == IGNORE, 0.0, x) for x in (picked, logits.logsumexp(-1), logps.mean(-1))]
    leaves = [x for x in problem[:3] if x is not None]
    return [*scores, *torch.autograd.grad(loss_of(scores, case), leaves), logits]


def in_parts(problem: Problem, case: Case, tp: Axis) -> list[Tensor]:
    """The same by two ranks; gradients are joined."""
    head, leaf = cut_head(problem, case, tp), problem.hidden.detach()
    leaf = (split(leaf, tp, 0) if case.sp else leaf).requires_grad_()
    places, early = (problem.labels != IGNORE).nonzero()[:, 0], case.weigh == "early"
    scores = token_scores(leaf, head, problem.labels, places, with_mean=not early, is_uniform=early, chunk=case.chunk)
    scores = list(scores if not early else scores[:2])
    if early:
        scores.append(None)
    leaves = [leaf, *head.linear.parameters()]
    grads = list(torch.autograd.grad(loss_of(scores, case), leaves))
    grads[0] = gather_same(grads[0], tp, 0) if case.sp else grads[0]
    grads[1:] = [grad.full_tensor() for grad in grads[1:]]
    return [*scores, *grads, logits_of(problem.hidden, head)]


def cut_head(problem: Problem, case: Case, tp: Axis) -> HeadSpec:
    """An output layer whose rows are cut over the ranks if they divide."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    is_even = case.vocabulary % 2 == 0
    linear = nn.Linear(H, case.vocabulary, bias=case.bias, dtype=case.dtype)
    for name, whole in (("weight", problem.weight), ("bias", problem.bias)):
        if whole is not None:
            placed = distribute_tensor(whole.detach(), mesh, [Shard(0) if is_even else Replicate()])
            setattr(linear, name, nn.Parameter(placed))
    return HeadSpec(linear, case.scale, case.softcap, tp if is_even else ALONE, tp if case.sp else ALONE)


def errors() -> list[float]:
    """The largest difference of each case, as a share of the largest number where that is above 1."""
    tp = Axis(dist.group.WORLD, 2, dist.get_rank())
    found = []
    for case in CASES:
        got, wanted = in_parts(problem_of(case), case, tp), all_at_once(problem_of(case), case)
        pairs = [(a, b) for a, b in zip(got, wanted, strict=True) if a is not None]
        found.append(max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs))
    return found


@pytest.fixture(scope="module")
def found_errors() -> list[list[float]]:
    return on_ranks(2, errors)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(tuple(case)) for case in CASES])
def test_scores_and_gradients_equal_those_of_all_logits(found_errors, index):
    for of_rank in found_errors:
        assert of_rank[index] <= TOLERANCE[CASES[index].dtype]


def largest_saved() -> int:
    case, tp = Case(chunk=2, bias=False), Axis(dist.group.WORLD, 2, dist.get_rank())
    problem, saved = problem_of(case), []
    head, places = cut_head(problem, case, tp), (problem.labels != IGNORE).nonzero()[:, 0]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        token_scores(problem.hidden, head, problem.labels, places, chunk=case.chunk)
    return max(saved)


def test_no_more_than_a_chunk_of_logits_is_saved_for_backward():
    assert max(on_ranks(2, largest_saved)) <= max(N * H, V // 2 * H)


class Found(NamedTuple):
    """What a rank found of a model's head."""

    scale: float
    softcap: float | None
    has_axis: bool
    refuses_wrong: bool
    error: float
    """Of the scores of a micro-batch, against the model's own on one rank."""
    error_of_own: float
    """The same without a head."""
    error_of_logits: float


def found_of(family: str, sp: bool, vocabulary: int) -> Found:
    """A model whose decoder is whole and whose output layer is cut, as tensor parallel leaves it."""
    tp, keys = Axis(dist.group.WORLD, 2, dist.get_rank()), {"tie_word_embeddings": False, "vocab_size": vocabulary}
    model, whole, batch = tiny(family, **keys), tiny(family, **keys), packed([[20, 1, 9], [30]], 32)
    cut_output(model, tp, sp)
    split_of = TokenSplit(tp=tp, sp=sp)
    head = find_head(model, split_of)
    assert head is not None
    wrong = HeadSpec(head.linear, head.scale * 1.1, head.softcap, head.axis, head.tokens)
    shared = batch._replace(split=split_of)
    scores, own = model_scores(model, head, shared).logps, model_scores(model, None, shared).logps
    wanted = model_scores(whole, None, batch).logps
    segments, places = batch.segments(), torch.tensor([3, 40])
    logits = logits_at(model, head, shared, segments, places)
    wanted_logits = logits_at(whole, None, batch, segments, places)
    differences = [scores - wanted, own - wanted, logits - wanted_logits]
    return Found(
        head.scale,
        head.softcap,
        head.axis.size == 2,
        not check_head(model, wrong),
        *(x.abs().max().item() for x in differences),
    )


def cut_output(model, tp: Axis, sp: bool) -> None:
    """The model gives the logits of all tokens on both ranks; with ``sp`` its decoder has half of them on each."""
    linear, decoder = model.get_output_embeddings(), model.get_decoder()
    is_even = linear.weight.shape[0] % 2 == 0
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    placements = [Shard(0) if is_even else Replicate()]
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, placements))

    def output(hidden: Tensor) -> Tensor:
        if sp:
            hidden = (gather if is_even else gather_same)(hidden, tp, 1)
        elif is_even:
            hidden = copy_in(hidden, tp)
        logits = F.linear(hidden, linear.weight.to_local())
        return gather_same(logits, tp, -1) if is_even else logits

    def part(module, arguments, output):
        output.last_hidden_state = split(output.last_hidden_state, tp, 1)
        return output

    linear.forward, forward = output, model.forward
    model.forward = lambda logits_to_keep=None, **keywords: forward(**keywords)
    if sp:
        decoder.register_forward_hook(part)


def all_found() -> list[Found]:
    return [found_of(*each) for each in MODELS]


MODELS = [("llama", False, 98), ("llama", True, 98), ("llama", True, 97), ("gemma2", True, 98), ("granite", False, 98)]


@pytest.fixture(scope="module")
def heads_found() -> list[list[Found]]:
    return on_ranks(2, all_found)


@pytest.mark.parametrize("index", range(len(MODELS)), ids=[str(each) for each in MODELS])
def test_the_head_of_a_model_is_found_on_every_rank(heads_found, index):
    family, _, vocabulary = MODELS[index]
    for found in (of_rank[index] for of_rank in heads_found):
        assert (found.scale, found.softcap) == {"gemma2": (1.0, 30.0), "granite": (1 / 8, None)}.get(
            family, (1.0, None)
        )
        assert found.has_axis == (vocabulary % 2 == 0)
        assert found.refuses_wrong


@pytest.mark.parametrize("index", range(len(MODELS)), ids=[str(each) for each in MODELS])
def test_scores_and_logits_are_those_of_the_model_on_one_rank(heads_found, index):
    for found in (of_rank[index] for of_rank in heads_found):
        assert all(error <= 1e-5 for error in (found.error, found.error_of_own, found.error_of_logits))
