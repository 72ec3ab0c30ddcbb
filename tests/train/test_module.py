"""A step's gradient does not depend on how the step is split: through Lightning's own loop."""

from collections.abc import Callable
from functools import cache
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from train.plain import TOLERANCE, model_of
from train.rows import Row, chat_rows, document_rows, pair_rows, step_of
from train.steps import MARKS, Recorder, Stream, gradient_error, make_module, run, task_of
from train.tiny_models import FAMILIES, VOCAB, packed, tiny

from llmt_shared.segments import Spans
from llmt_train.data.batch import collate
from llmt_train.model.head import find_head

pytestmark = MARKS

LENGTH = 24
ROWS = [[24], [5, 7], [1, 1, 1], [10, 14], [2], [20, 3], [12, 12]]
"""Very unequal targets: 23, 10, 0, 22, 1, 21, 22; an eighth row is left to padding."""


def micro_batches(num_micro, targets):
    """Rows 0 .. 7 in ``num_micro`` micro-batches; the last row is empty: of 8 micro-batches the last is padding."""
    tokens = np.random.default_rng(0).integers(3, VOCAB, (8, LENGTH))
    rows, size = [*ROWS, []], 8 // num_micro
    batches = []
    for first in range(0, 8, size):
        part = rows[first : first + size]
        lengths = np.array([n for row in part for n in row], np.int64)
        per_row = np.array([len(row) for row in part])
        sources = np.array([(first + i) % 3 for i, row in enumerate(part) for _ in row], np.int64)
        batches.append(collate(tokens[first : first + size], per_row, lengths, sources, None, {"targets": targets}))
    return batches


TARGETS = float(sum(max(n - 1, 0) for row in ROWS for n in row))


def full_batch(model, batches):
    """Plain autograd on the mean over all targets of all rows, without Lightning and without our head."""
    total = 0
    for batch in batches:
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments()).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, batch.labels[0], reduction="sum")
    (total / TARGETS).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return (total / TARGETS).item(), gradients


# In fp64 only families that compute in it throughout: Gemma's norms sum the gradient of their weight in fp32.
IN_FP64 = [(family, torch.float64, 1e-10) for family in ("llama", "phi3", "qwen3", "mistral", "gpt2")]
IN_FP32 = [(family, torch.float32, 1e-5) for family in FAMILIES]


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
@pytest.mark.parametrize(("family", "dtype", "tolerance"), [*IN_FP64, *IN_FP32])
def test_gradients_of_any_accumulation_equal_the_full_batchs(accumulation, family, dtype, tolerance):
    model = tiny(family, dtype=dtype)
    loss, wanted = full_batch(model, micro_batches(1, TARGETS))
    recorder = run(make_module(model), micro_batches(accumulation, TARGETS), accumulation)
    assert len(recorder.gradients) == 1
    assert gradient_error(recorder.gradients[0], wanted) <= tolerance
    assert recorder.losses[0] == pytest.approx(loss, rel=tolerance)


def test_the_mean_per_micro_batch_would_be_wrong():
    """The batches are unequal enough for these tests to see a wrong normalisation."""
    model = tiny("llama", dtype=torch.float64)
    _, wanted = full_batch(model, micro_batches(1, TARGETS))
    own = [
        b._replace(denominators={"targets": 4 * max(1.0, (b.labels >= 0).sum().item())}) for b in micro_batches(4, 1.0)
    ]
    assert gradient_error(run(make_module(model), own, 4).gradients[0], wanted) > 0.1


def test_the_models_own_logits_give_the_same_gradients():
    model = tiny("llama", dtype=torch.float64)
    _, wanted = full_batch(model, micro_batches(1, TARGETS))
    recorder = run(make_module(model, head=None), micro_batches(8, TARGETS), 8)
    assert gradient_error(recorder.gradients[0], wanted) <= 1e-10


def test_the_loss_of_every_step_is_its_own():
    model = tiny("llama", dtype=torch.float64)
    loss, _ = full_batch(model, micro_batches(1, TARGETS))
    recorder = run(make_module(model), micro_batches(4, TARGETS) * 3, 4, steps=3)
    assert recorder.losses == pytest.approx([loss] * 3, rel=1e-12)


def test_training_lowers_the_loss():
    module = make_module(tiny("llama"), lr=0.5)
    losses = run(module, micro_batches(4, TARGETS) * 25, 4, steps=25).losses
    assert losses[-1] < 0.8 * losses[0]


def test_spans_and_accumulation_agree_with_the_full_batch():
    """As in a chat: most tokens are no targets."""
    tokens = np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH))
    spans = [Spans(np.array([3, 15]), np.array([4, 2])), Spans(np.array([1]), np.array([1]))]
    model, results = tiny("llama", dtype=torch.float64), []
    halves = [
        collate(tokens[i : i + 1], np.array([2]), np.array([10, 12]), np.zeros(2), spans[i], {"targets": 7.0})
        for i in (0, 1)
    ]
    both = Spans(np.append(spans[0].start, spans[1].start + LENGTH), np.append(spans[0].length, spans[1].length))
    whole = collate(tokens, np.array([2, 2]), np.array([10, 12] * 2), np.zeros(4), both, {"targets": 7.0})
    for batches in ([whole], halves):
        results.append(run(make_module(model), batches, len(batches)))
    assert gradient_error(results[1].gradients[0], results[0].gradients[0]) <= 1e-10


CASES: dict[str, tuple[str, dict[str, Any], list[Row]]] = {
    "clm": ("pretrain", {}, document_rows()),
    "clm with spans": ("sft", {}, chat_rows()),
    "clm with z-loss and smoothing": ("sft", {"z_loss": 0.01, "label_smoothing": 0.1}, chat_rows()),
    "clm with noise": ("sft", {"neftune": 5}, chat_rows()),
    "clm with noise, z-loss": ("pretrain", {"neftune": 5, "z_loss": 0.01}, document_rows()),
    "dpo": ("dpo", {}, pair_rows()),
    "dpo, conservative": ("dpo", {"label_smoothing": 0.2}, pair_rows()),
    "dpo, robust": ("dpo", {"loss": "robust", "label_smoothing": 0.2}, pair_rows()),
    "dpo, ipo": ("dpo", {"loss": "ipo"}, pair_rows()),
    "dpo, length-normalised": ("dpo", {"length_normalised": True}, pair_rows()),
    "dpo with sft": ("dpo", {"sft_weight": 0.5}, pair_rows()),
    "orpo": ("orpo", {}, pair_rows()),
    "orpo, nll on all": ("orpo", {"nll_on": "all"}, pair_rows()),
}
"""Task, settings, and rows with very unequal numbers of targets and pairs."""


def take_step(name: str, dtype: torch.dtype, sizes: list[int], order: list[int] | None = None, **keywords) -> Recorder:
    task, settings, rows = CASES[name]
    how = {
        "all_targets": task == "pretrain",
        "with_reference": task == "dpo",
        "with_chosen_prompts": settings.get("nll_on") == "all",
    }
    module = make_module(model_of("llama", dtype), task=task_of(task, settings), **keywords)
    return run(module, step_of(rows, sizes, order=order, **how), len(sizes))


@cache
def whole_step(name: str, dtype: torch.dtype) -> Recorder:
    return take_step(name, dtype, [len(CASES[name][2])])


SPLITS: dict[str, Callable[[int], tuple[list[int], list[int]]]] = {
    "one row each, and padding": lambda n: ([1] * n + [0], list(range(n))),
    "unequal": lambda n: ([3, n - 3], list(range(n))),
    "backwards": lambda n: ([n], list(range(n))[::-1]),
    "mixed, unequal, padding between": lambda n: ([2, 0, n - 3, 1], np.random.default_rng(0).permutation(n).tolist()),
}
"""Rows of each micro-batch, and the order of the n rows in them."""


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_no_objective_depends_on_how_a_steps_rows_are_split_or_ordered(name, split, dtype):
    """A row that moves to another micro-batch keeps its place in the run's order, of which its noise is a function."""
    sizes, order = SPLITS[split](len(CASES[name][2]))
    whole, recorder = whole_step(name, dtype), take_step(name, dtype, sizes, order)
    assert len(recorder.gradients) == 1
    assert gradient_error(recorder.gradients[0], whole.gradients[0]) <= TOLERANCE[dtype]
    wanted = pytest.approx(whole.measures[0], rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
    assert recorder.measures == [wanted]


@pytest.mark.parametrize("name", CASES)
def test_the_models_own_logits_give_every_objective_the_same_gradients(name):
    recorder = take_step(name, torch.float64, [2, len(CASES[name][2]) - 2], head=None)
    assert gradient_error(recorder.gradients[0], whole_step(name, torch.float64).gradients[0]) <= 1e-10


DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def test_dropout_is_a_function_of_seed_and_place():
    batches = micro_batches(2, TARGETS) * 3
    first, again = (run(make_module(tiny("gpt2", **DROPOUT)), batches, 2, steps=3).losses for _ in range(2))
    other = run(make_module(tiny("gpt2", **DROPOUT), seed=8), batches, 2, steps=3).losses
    assert first == again
    assert first != other
    assert len(set(first)) == 3  # lr is 0 and the data repeats: only dropout differs from step to step


def test_dropout_differs_between_the_micro_batches_of_a_step():
    batch = micro_batches(1, TARGETS)[0]
    module = make_module(tiny("gpt2", **DROPOUT))
    one = run(module, [batch], 1).losses[0]
    two = run(module, [batch, batch], 2).losses[0]
    assert two != pytest.approx(2 * one, rel=1e-6)


@pytest.mark.parametrize("head_is_known", [True, False])
def test_evaluation_sums_over_tokens_by_source(head_is_known):
    model = tiny("llama", dtype=torch.float64)
    head = find_head(model) if head_is_known else None
    sums = []
    for num_micro in (1, 8):
        module = make_module(model, num_sources=3, head=head)
        module.on_validation_epoch_start()
        for index, batch in enumerate(micro_batches(num_micro, 1.0)):
            module.validation_step(batch, index)
        sums.append([module.evaluation.means(source) for source in (0, 1, 2)])
        totals = module.evaluation.means()
    assert [source["targets"] for source in sums[0]] == [23 + 22 + 22, 10 + 1, 0 + 21]
    for one, eight in zip(*sums, strict=True):
        assert eight == pytest.approx(one, rel=1e-12)
    loss, _ = full_batch(model, micro_batches(1, TARGETS))
    assert totals == pytest.approx({"loss": loss, "nll": loss, "targets": TARGETS}, rel=1e-12)


def test_lightnings_own_validation_runs_without_gradients_and_in_evaluation_mode():
    module = make_module(tiny("gpt2", **DROPOUT), num_sources=3)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    batches = micro_batches(2, TARGETS)
    sums = []
    for _ in range(2):
        trainer.validate(module, Stream(batches), verbose=False)
        sums.append(module.evaluation.means())
    assert sums[0] == sums[1]
    assert module.model.training


def test_bf16_autocast_is_near_fp32():
    model = tiny("qwen3")
    loss, wanted = full_batch(model, micro_batches(1, TARGETS))
    recorder = run(make_module(model), micro_batches(2, TARGETS), 2, precision="bf16-mixed")
    assert recorder.losses[0] == pytest.approx(loss, rel=1e-3)
    assert {g.dtype for g in recorder.gradients[0].values()} == {torch.float32}
    assert gradient_error(recorder.gradients[0], wanted) <= 0.1


def test_a_batch_of_padding_alone_gives_an_exact_zero_that_reaches_every_parameter():
    recorder = run(make_module(tiny("gpt2", **DROPOUT)), [packed([[]], LENGTH, targets=5.0)], 1)
    assert recorder.losses == [0.0]
    assert not any(g.any() for g in recorder.gradients[0].values())
