"""DPO and ORPO on packed rows: what plain transformers and the published formulas make of the same pairs."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from train import plain
from train.plain import TOLERANCE, model_of, plain_of
from train.rows import NUM_SOURCES, Row, count, pair_rows, step_of
from train.steps import MARKS, gradient_error, make_module, run, task_of

from llmt_train.batch import PackedBatch
from llmt_train.callbacks import with_perplexity
from llmt_train.head import find_head
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
