"""Objectives: cross-entropy is that of plain transformers; sums, what they are divided by, and numbers at the ends."""

import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from train import plain
from train.plain import TOLERANCE, model_of, plain_of
from train.rows import NUM_SOURCES, Row, Segment, chat_rows, count, document_rows, pack, pair_rows, step_of
from train.steps import MARKS, gradient_error, make_module, run, task_of
from train.tiny_models import packed

from llmt_shared.segments import IGNORE
from llmt_train.data.batch import PackedBatch
from llmt_train.evaluation import with_perplexity
from llmt_train.model.head import Scores
from llmt_train.objectives import _log1mexp, clm, dpo, orpo, share

pytestmark = MARKS

CLM = [{}, {"z_loss": 0.01}, {"label_smoothing": 0.1}, {"z_loss": 0.01, "label_smoothing": 0.1}]
TASKS = {"pretrain": (document_rows(), True), "sft": (chat_rows(), False)}
"""Rows, and whether all their tokens are targets."""


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("settings", CLM, ids=lambda settings: "+".join(settings) or "plain")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_loss_measures_and_gradients_are_those_of_padded_segments(family, task, settings, dtype):
    rows, all_targets = TASKS[task]
    measures, tolerance = plain.clm_measures(rows, plain_of(family, dtype), **settings), TOLERANCE[dtype]
    gradients = plain.gradients(measures["loss"], plain_of(family, dtype))
    module = make_module(model_of(family, dtype), task=task_of(task, settings))
    recorder = run(module, step_of(rows, [len(rows)], all_targets=all_targets), 1)
    assert recorder.measures == [pytest.approx(plain.numbers(measures), rel=tolerance, abs=0)]
    assert gradient_error(recorder.gradients[0], gradients) <= tolerance


@pytest.mark.parametrize("task", TASKS)
def test_measures_of_many_micro_batches_are_those_of_padded_segments(task):
    rows, all_targets = TASKS[task]
    expected = plain.numbers(plain.clm_measures(rows, plain_of("llama", torch.float64), **CLM[-1]))
    module = make_module(model_of("llama", torch.float64), task=task_of(task, CLM[-1]))
    recorder = run(module, step_of(rows, [1, 4, 0, 2], all_targets=all_targets), 4)
    assert recorder.measures == [pytest.approx(expected, rel=1e-10)]


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_is_the_bare_cross_entropy_of_each_source(task):
    """Whatever is added to the loss in training."""
    rows, all_targets = TASKS[task]
    settings = CLM[-1] | {"neftune": 5}
    module = make_module(model_of("llama", torch.float64), task=task_of(task, settings), num_sources=NUM_SOURCES)
    module.on_validation_epoch_start()
    with torch.no_grad():
        for index, batch in enumerate(step_of(rows, [3, 2, 0, 2], all_targets=all_targets)):
            module.validation_step(batch._replace(denominators={}), index)
    for source in (None, *range(NUM_SOURCES)):
        segments = [each for row in rows for each in row.segments if source in (None, each.source)]
        expected = plain.numbers(plain.clm_measures([Row(tuple(segments))], plain_of("llama", torch.float64)))
        counted = {"perplexity": math.exp(expected["nll"]), "targets": count([Row(tuple(segments))])["targets"]}
        assert with_perplexity(module.evaluation.means(source)) == pytest.approx(expected | counted, rel=1e-10)


def test_clm_is_the_summed_negative_log_likelihood_over_the_steps_targets():
    batch = packed([[5, 3]], 10, targets=123.0)
    logps = torch.randn(10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logps = torch.where(batch.labels[0] >= 0, logps, 0.0)
    loss = share(clm(Scores(logps, logps, None), batch)["loss"], batch.denominators)
    torch.testing.assert_close(loss, -logps.sum() / 123.0)


def some_scores(batch: PackedBatch) -> Scores:
    """Scores that are a function of a token, its label and its place in its segment, whatever lies around it."""
    ids, labels, positions = (x[0].double() for x in (batch.input_ids, batch.labels, batch.position_ids))
    place = 31 * ids + 17 * labels + 7 * positions
    logps, lse, mean = (torch.where(labels != IGNORE, sign * (0.1 + place % m / 9), 0.0) for sign, m in
                        ((-1, 53), (1, 47), (-1, 101)))  # fmt: skip
    return Scores(logps, lse, mean)


def measures_of(task: str, settings: dict[str, Any], batches: list[PackedBatch]) -> dict[str, float]:
    """The step's."""
    objective = task_of(task, settings).objective
    parts = [
        {name: share(parts, batch.denominators).item() for name, parts in objective(some_scores(batch), batch).items()}
        for batch in batches
    ]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


SPLIT: dict[str, tuple[str, dict[str, Any], Any]] = {
    "clm": ("sft", CLM[-1], chat_rows),
    "dpo": ("dpo", {"label_smoothing": 0.1, "sft_weight": 0.5}, pair_rows),
    "ipo": ("dpo", {"loss": "ipo", "length_normalised": True}, pair_rows),
    "orpo": ("orpo", {"nll_on": "all"}, pair_rows),
}


@pytest.mark.parametrize("name", SPLIT)
@given(data=st.data())
def test_any_split_and_any_order_of_rows_give_the_same_measures(name, data):
    task, settings, make_rows = SPLIT[name]
    rows = make_rows(data.draw(st.integers(0, 99), label="seed"))
    order = data.draw(st.permutations(range(len(rows))), label="order")
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=6).map(sorted), label="cuts")
    how = {"with_reference": task == "dpo", "with_chosen_prompts": name == "orpo"}
    sizes = np.diff([0, *cuts, len(rows)]).tolist()
    whole = measures_of(task, settings, step_of(rows, [len(rows)], **how))
    split = measures_of(task, settings, step_of(rows, sizes, order=order, **how))
    assert split == pytest.approx(whole, rel=1e-12)


def test_labels_of_prompts_change_no_likelihood_of_answers():
    """A batch may have more labels than targets."""
    rows = pair_rows()
    bare, labelled = (step_of(rows, [len(rows)], with_chosen_prompts=labelled) for labelled in (False, True))
    assert measures_of("orpo", {}, labelled) == pytest.approx(measures_of("orpo", {}, bare), rel=1e-12)


DIGITS = 350
"""As many as 1 - exp(-700) and exp(-1e-300) need."""


def exact_log1mexp(x: float) -> tuple[float, float]:
    """log(1 - exp(x)) and its slope, -1 / (exp(-x) - 1), in enough digits."""
    with localcontext() as context:
        context.prec = DIGITS
        e = Decimal(x).exp()
        return float((1 - e).ln()), float(-e / (1 - e))


@given(st.floats(-700, -1e-300))
@example(-math.log(2))
@example(-1e-300)
@example(-1e-12)
@example(-700.0)
def test_log1mexp_and_its_slope_are_exact(x):
    argument = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    value = _log1mexp(argument)
    (slope,) = torch.autograd.grad(value.sum(), argument)
    wanted, wanted_slope = exact_log1mexp(x)
    assert value.item() == pytest.approx(wanted, rel=1e-15, abs=0)
    assert slope.item() == pytest.approx(wanted_slope, rel=1e-14, abs=0)


def test_log1mexp_is_zero_where_exp_is():
    argument = torch.tensor([-1e4, -1e300], dtype=torch.float64, requires_grad=True)
    value = _log1mexp(argument)
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0]
    assert argument.grad.tolist() == [0.0, 0.0]


ANSWER = 3
"""Targets of each side of `one_pair`."""


def one_pair(means: list[float], dtype: torch.dtype = torch.float64) -> tuple[PackedBatch, torch.Tensor]:
    """A pair whose sides have a prompt of one token, and log-probabilities with these means."""
    side = Segment(np.zeros(1 + ANSWER, np.int64), np.arange(1 + ANSWER) > 0)
    rows = [Row((side, side), ((0, 1),))]
    batch = pack(rows, [0], count(rows))
    logps = torch.zeros(batch.labels.shape[1], dtype=dtype)
    logps[batch.label_places] = torch.tensor(means, dtype=dtype).repeat_interleave(ANSWER)
    return batch, logps.requires_grad_()


def exact_odds_ratio_loss(chosen: float, rejected: float, beta: float) -> float:
    """Of mean log-probabilities, as the paper writes it."""
    with localcontext() as context:
        context.prec = DIGITS
        odds = [Decimal(mean).exp() / (1 - Decimal(mean).exp()) for mean in (chosen, rejected)]
        return beta * float((1 + odds[1] / odds[0]).ln())


ENDS = [-1e4, -745.0, -1.0, -1e-6, -1e-11]


@pytest.mark.parametrize("rejected", ENDS)
@pytest.mark.parametrize("chosen", ENDS)
def test_the_odds_ratio_term_is_exact_at_the_ends(chosen, rejected):
    batch, logps = one_pair([chosen, rejected])
    measures = orpo(Scores(logps, logps, None), batch, beta=0.5)
    nll, term = (share((part,), batch.denominators).item() for part in measures["loss"])
    assert nll == pytest.approx(-chosen, rel=1e-12)
    assert term == pytest.approx(exact_odds_ratio_loss(chosen, rejected, 0.5), rel=1e-12, abs=1e-300)


extreme = st.one_of(st.floats(-1e4, 0), st.floats(-1e-6, 0), st.sampled_from([0.0, 1e-7, -1e-12, -1e-38, -1e4]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@given(extreme, extreme)
@example(0.0, 0.0)
@example(-1e4, 0.0)
@example(1e-7, -1e4)
def test_orpo_and_its_gradient_are_finite_at_any_log_probabilities(dtype, chosen, rejected):
    """Rounding may put a log-probability above 0."""
    batch, logps = one_pair([chosen, rejected], dtype)
    measures = orpo(Scores(logps, logps, None), batch, beta=0.5)
    loss = share(measures["loss"], batch.denominators)
    loss.backward()
    assert math.isfinite(loss.item())
    assert logps.grad.isfinite().all()


@given(st.sampled_from(["sigmoid", "robust"]), extreme, extreme)
def test_dpo_and_its_gradient_are_finite_at_any_log_probabilities(loss, chosen, rejected):
    batch, logps = one_pair([chosen, rejected])
    measures = dpo(Scores(logps, logps, None), batch, loss=loss, label_smoothing=0.1, sft_weight=1.0)
    total = share(measures["loss"], batch.denominators)
    total.backward()
    assert math.isfinite(total.item())
    assert logps.grad.isfinite().all()
