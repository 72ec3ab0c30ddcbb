"""DPO and ORPO on packed rows: what plain transformers and the published formulas make of the same pairs."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from train import plain
from train.plain import TOLERANCE, model_of, plain_of
from train.rows import NUM_SOURCES, Row, Segment, count, pack, pair_rows, step_of
from train.steps import MARKS, gradient_error, make_module, run, task_of

from llmt_train.data.batch import PackedBatch
from llmt_train.evaluation import with_perplexity
from llmt_train.model.head import Scores, find_head
from llmt_train.objectives import share
from llmt_train.reference import live_reference

pytestmark = MARKS

ROWS = pair_rows()
KINDS: list[dict[str, Any]] = [
    {"loss": "sigmoid"},
    {"loss": "sigmoid", "label_smoothing": 0.2},
    {"loss": "robust", "label_smoothing": 0.2},
    {"loss": "ipo"},
]
DPO = [
    {**kind, "beta": 0.3, "length_normalised": normalised, "sft_weight": weight, "reference": reference}
    for kind, normalised, weight, reference in product(KINDS, (False, True), (0.0, 0.5), ("model", "none"))
]
ORPO = [{"beta": 0.3, "nll_on": "response"}, {"beta": 0.3, "nll_on": "all"}]
CASES = [("dpo", settings) for settings in DPO] + [("orpo", settings) for settings in ORPO]
IN_BOTH = [("llama", *case) for case in CASES] + [("qwen3", *case) for case in [*CASES[::7], CASES[-1]]]


def named(settings: Any) -> str | None:
    """A readable part of a test's name."""
    return "-".join(str(value) for value in settings.values()) if isinstance(settings, dict) else None


def wanted(
    name: str, settings: Mapping[str, Any], family: str, dtype: torch.dtype, rows: list[Row] = ROWS
) -> dict[str, Any]:
    """The published formulas on the log-probabilities of plain transformers; the reference has other weights."""
    formula = {key: value for key, value in settings.items() if key != "reference"}
    reference = plain_of(family, dtype, seed=1) if settings.get("reference") == "model" else None
    pairs = plain.sides(rows, plain_of(family, dtype), reference)
    return plain.orpo_measures(pairs, **formula) if name == "orpo" else plain.dpo_measures(pairs, **formula)


def live(settings: Mapping[str, Any], family: str, dtype: torch.dtype) -> Callable[[PackedBatch], Tensor] | None:
    """The same reference on packed rows, where there is one."""
    if settings.get("reference") != "model":
        return None
    model = model_of(family, dtype, seed=1)
    return live_reference(model, find_head(model))


def batches_of(settings: Mapping[str, Any], sizes: list[int]) -> list[PackedBatch]:
    return step_of(ROWS, sizes, with_chosen_prompts=settings.get("nll_on") == "all")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("family", "name", "settings"), IN_BOTH, ids=named)
def test_loss_measures_and_gradients_are_those_of_padded_pairs(family, name, settings, dtype):
    measures, tolerance = wanted(name, settings, family, dtype), TOLERANCE[dtype]
    gradients = plain.gradients(measures["loss"], plain_of(family, dtype))
    task = task_of(name, settings, live(settings, family, dtype))
    recorder = run(make_module(model_of(family, dtype), task=task), batches_of(settings, [len(ROWS)]), 1)
    measured, expected = recorder.measures[0], plain.numbers(measures)
    assert measured["loss"] == pytest.approx(expected["loss"], rel=tolerance, abs=0)
    # Means of differences may be near zero.
    assert measured == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert gradient_error(recorder.gradients[0], gradients) <= tolerance


@pytest.mark.parametrize(("name", "settings"), CASES, ids=named)
def test_measures_of_many_micro_batches_are_those_of_padded_pairs(name, settings):
    expected = plain.numbers(wanted(name, settings, "llama", torch.float64))
    task = task_of(name, settings, live(settings, "llama", torch.float64))
    module = make_module(model_of("llama", torch.float64), task=task)
    recorder = run(module, batches_of(settings, [1, 3, 0, 1]), 4)
    assert recorder.measures == [pytest.approx(expected, rel=1e-10)]


def of_source(source: int) -> list[Row]:
    """The pairs of one source."""
    return [
        Row(row.segments, tuple(pair for pair in row.pairs if row.segments[pair[0]].source == source)) for row in ROWS
    ]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=named)
def test_evaluation_by_source_is_that_of_the_sources_padded_pairs(name, settings):
    task = task_of(name, settings, live(settings, "llama", torch.float64))
    module = make_module(model_of("llama", torch.float64), task=task, num_sources=NUM_SOURCES)
    module.on_validation_epoch_start()
    with torch.no_grad():
        for index, batch in enumerate(batches_of(settings, [2, 1, 2, 0])):
            module.validation_step(batch._replace(denominators={}), index)
    for source in (None, *range(NUM_SOURCES)):
        rows = ROWS if source is None else of_source(source)
        expected = plain.numbers(wanted(name, settings, "llama", torch.float64, rows))
        expected["perplexity"] = torch.tensor(expected["nll"], dtype=torch.float64).exp().item()
        measured = with_perplexity(module.evaluation.means(source))
        counts = {key: measured.pop(key) for key in set(measured) & {"pairs", "chosen_targets", "chosen_labels"}}
        assert measured == pytest.approx(expected, rel=1e-10)
        assert counts == {key: count(rows)[key] for key in counts} != {}


# Log-probabilities of the targets of both sides of three pairs, and their sums under a reference.
CHOSEN = [[-0.5, -1.25, -0.1], [-3.0], [-0.01, -0.02]]
REJECTED = [[-2.0, -0.75], [-0.2, -0.3, -0.4, -4.0], [-1.5, -0.6, -0.9]]
REFERENCE = [[-2.5, -2.0], [-1.5, -6.0], [-1.0, -2.75]]
SMOOTHED = {"label_smoothing": 0.2}
LENGTH_NORMALISED = {"length_normalised": True}
TRL = [
    ("sigmoid", "dpo", {}, 0.7297267024700872),
    ("robust", "dpo", {"loss": "robust", **SMOOTHED}, 0.7290600358034206),
    ("ipo", "dpo", {"loss": "ipo", **LENGTH_NORMALISED}, 4.735676851851852),
    ("sigmoid_norm", "dpo", LENGTH_NORMALISED, 0.7380958538396256),
    ("sigmoid and 0.5 sft", "dpo", {"sft_weight": 0.5}, 1.1363933691367538),
    ("odds_ratio_loss", "orpo", {}, 0.24526597559452057),
]
"""TRL's name, ours, our settings, and the mean loss over the three pairs that TRL gave."""


def the_three_pairs() -> tuple[Scores, PackedBatch]:
    sides = [side for pair in zip(CHOSEN, REJECTED, strict=True) for side in pair]
    references = [value for pair in REFERENCE for value in pair]
    segments = [
        Segment(np.zeros(1 + len(side), np.int64), np.arange(1 + len(side)) > 0, 0, reference)
        for side, reference in zip(sides, references, strict=True)
    ]
    rows = [Row(tuple(segments), ((0, 1), (2, 3), (4, 5)))]
    batch = pack(rows, [0], count(rows), with_reference=True)
    logps = torch.zeros(batch.labels.shape[1], dtype=torch.float64)
    logps[batch.label_places] = torch.tensor([logp for side in sides for logp in side], dtype=torch.float64)
    return Scores(logps, logps, None), batch


@pytest.mark.parametrize(("name", "settings", "golden"), [case[1:] for case in TRL], ids=[case[0] for case in TRL])
def test_losses_are_those_that_trl_gave(name, settings, golden):
    """The numbers are TRL 1.16's, with transformers 5.23 and torch 2.13, beta 0.3 and label_smoothing 0.2.

    `DPOTrainer._compute_loss` got these log-probabilities, padded, from a stand-in for the model, and the references as
    precomputed ones; its ``sigmoid`` does not read label_smoothing, and its ``ipo`` is normalised by length.
    `ORPOTrainer.odds_ratio_loss` got their means, which it rounds to fp32.
    """
    scores, batch = the_three_pairs()
    loss = task_of(name, {"beta": 0.3, **settings}).objective(scores, batch)["loss"]
    parts = loss if name == "dpo" else loss[1:]  # without ORPO's likelihood
    assert share(parts, batch.denominators).item() == pytest.approx(golden, rel=1e-14 if name == "dpo" else 1e-7)
