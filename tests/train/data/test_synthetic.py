"""Rows out of thin air: the lengths that were asked for, what FORMAT.md promises of rows, and whole runs on them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from train.interrupted import curve, interrupt

from llmt_shared.errors import ConfigError
from llmt_shared.segments import expand
from llmt_train.config import RunConfig, SyntheticConfig
from llmt_train.data.synthetic import SyntheticSplit, open_synthetic
from llmt_train.export import export
from llmt_train.fit import fit
from llmt_train.precompute import precompute
from llmt_train.setup import open_rows
from llmt_train.watch.metrics import read_metrics

VOCAB = 50
KINDS = ("pretrain", "sft", "preference")
SHORTEST = {"pretrain": 2, "sft": 2, "preference": 4}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "vocab_size": VOCAB, "max_position_embeddings": 32,
}  # fmt: skip


def rows_of(kind: str = "pretrain", vocab_size: int = VOCAB, **settings: Any) -> SyntheticSplit:
    return open_synthetic(SyntheticConfig(**settings), kind, vocab_size).train


def first_lengths(split: SyntheticSplit) -> np.ndarray:
    """Of the first document of every row: the only one that no other one has left less room to."""
    table = split.segments(range(split.num_rows))
    return table.length[np.cumsum(table.per_row) - table.per_row].astype(np.float64)


@pytest.mark.parametrize(("median", "sigma"), [(300.0, 0.8), (2000.0, 0.3), (50.0, 1.2)])
def test_documents_have_the_median_and_the_spread_that_were_asked_for(median: float, sigma: float) -> None:
    lengths = first_lengths(rows_of(length=1 << 17, rows=3000, median=median, sigma=sigma))
    assert np.median(lengths) == pytest.approx(median, rel=0.06)
    assert np.log(lengths).std() == pytest.approx(sigma, rel=0.06)


def test_where_rows_are_long_the_documents_in_them_are_as_asked_for() -> None:
    lengths = rows_of(length=1 << 16, rows=20, median=100, sigma=1).segments(range(20)).length
    assert np.median(lengths) == pytest.approx(100, rel=0.03)
    assert lengths.mean() == pytest.approx(100 * math.exp(0.5), rel=0.03)


def test_without_spread_all_documents_but_a_rows_last_are_equal() -> None:
    table = rows_of(length=100, rows=3, median=30, sigma=0).segments(range(3))
    assert table.length.tolist() == [30, 30, 30, 10] * 3


def test_a_document_longer_than_its_row_is_cut_to_it() -> None:
    lengths = first_lengths(rows_of(length=64, rows=500, median=60, sigma=2))
    assert lengths.max() == 64
    assert np.median(lengths) == pytest.approx(60, abs=8)


@st.composite
def settings(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "length": draw(st.integers(4, 300)),
        "median": draw(st.floats(1.1, 400)),
        "sigma": draw(st.floats(0, 4)),
        "targets": draw(st.floats(0.01, 1)),
        "seed": draw(st.integers(0, 99)),
        "rows": 40,
    }


some_rows = st.lists(st.integers(0, 39), max_size=6)


@given(settings(), some_rows, st.sampled_from(KINDS))
def test_rows_are_full_but_for_less_than_the_shortest_document(chosen: dict, rows: list[int], kind: str) -> None:
    split = rows_of(kind, **chosen)
    table = split.segments(rows)
    real = np.bincount(np.repeat(np.arange(len(rows)), table.per_row), table.length, len(rows))
    assert (real <= split.length).all()
    assert (split.length - real < SHORTEST[kind]).all()
    for tokens, size in zip(split.tokens(rows), real.astype(int), strict=True):
        assert not tokens[size:].any()


@given(settings(), some_rows, st.sampled_from(KINDS))
def test_targets_are_counted_as_they_are_labelled(chosen: dict, rows: list[int], kind: str) -> None:
    split = rows_of(kind, **chosen)
    table = split.segments(rows)
    dense = expand(split.tokens(rows), table.per_row, table.length, split.spans(rows))
    labelled = (dense.labels.reshape(len(rows), split.length) >= 0).sum(axis=1)
    assert split.targets(rows).tolist() == labelled.tolist()
    assert (labelled > 0).all()


@given(settings(), some_rows)
def test_every_chat_ends_with_its_share_of_targets(chosen: dict, rows: list[int]) -> None:
    split = rows_of("sft", **chosen)
    table, spans = split.segments(rows), split.spans(rows)
    assert spans is not None
    ends = [
        place * split.length + end
        for place, row in enumerate(rows)
        for end in np.cumsum(split.segments([row]).length, dtype=np.int64)
    ]
    assert (spans.start + spans.length).tolist() == ends
    wanted = np.clip(np.rint(table.length * chosen["targets"]), 1, table.length - 1.0)
    assert spans.length.tolist() == wanted.tolist()


@given(settings(), some_rows)
def test_pairs_are_neighbours_and_their_chosen_targets_are_counted(chosen: dict, rows: list[int]) -> None:
    split = rows_of("preference", **chosen)
    table, pairs = split.segments(rows), split.pairs(rows)
    assert pairs is not None
    assert pairs.segments.ravel().tolist() == list(range(len(table.length)))  # every segment is one side of one pair
    assert (pairs.per_row * 2).tolist() == table.per_row.tolist()
    chosen_sides, rejected_sides = pairs.segments.T
    assert table.document[chosen_sides].tolist() == table.document[rejected_sides].tolist()
    assert not table.offset[chosen_sides].any()
    assert table.offset[rejected_sides].tolist() == table.length[chosen_sides].tolist()
    spans = split.spans(rows)
    assert spans is not None
    by_row = np.bincount(np.repeat(np.arange(len(rows)), pairs.per_row), spans.length[::2], len(rows))
    assert pairs.chosen_targets.tolist() == by_row.tolist()


def test_documents_and_segments_of_different_rows_have_different_numbers() -> None:
    split = rows_of("preference", length=64, rows=200, median=8)
    pairs, table = split.pairs(range(200)), split.segments(range(200))
    assert pairs is not None
    assert (np.diff(pairs.numbers.ravel()) > 0).all()
    assert len(np.unique(table.document)) == len(pairs.numbers)


def content(split: SyntheticSplit, row: int) -> tuple:
    parts = [split.tokens([row]), *split.segments([row]), split.targets([row])]
    parts += [*(split.spans([row]) or ()), *(split.pairs([row]) or ())]
    return tuple(part.tobytes() for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_a_function_of_seed_and_number(kind: str) -> None:
    one = {"length": 200, "median": 20, "rows": 100}
    forwards, backwards = rows_of(kind, **one), rows_of(kind, **one | {"rows": 77, "held_out": 5})
    first = [content(forwards, row) for row in range(77)]
    assert [content(backwards, row) for row in reversed(range(77))] == first[::-1]
    assert len(set(first)) == 77
    other = rows_of(kind, **one, seed=1)
    assert not {content(other, row) for row in range(77)} & set(first)


@given(settings(), some_rows, st.sampled_from(KINDS))
def test_rows_read_together_are_those_read_alone(chosen: dict, rows: list[int], kind: str) -> None:
    split = rows_of(kind, **chosen)
    together = split.tokens(rows), *split.segments(rows), split.targets(rows)
    alone = [(split.tokens([row]), *split.segments([row]), split.targets([row])) for row in rows]
    for whole, *parts in zip(together, *alone, strict=True):
        assert whole.tolist() == [value for part in parts for value in part.tolist()]


def test_held_out_rows_are_others() -> None:
    dataset = open_synthetic(SyntheticConfig(length=64, rows=8, held_out=3), "pretrain", VOCAB)
    assert dataset.validation is not None
    assert dataset.validation.num_rows == 3
    train, held_out = ({content(split, row) for row in range(3)} for split in (dataset.train, dataset.validation))
    assert not train & held_out
    assert open_synthetic(SyntheticConfig(length=64), "pretrain", VOCAB).validation is None


@pytest.mark.parametrize("length", [4096, 4095])
def test_tokens_are_spread_evenly_over_the_vocabulary(length: int) -> None:
    tokens = rows_of(vocab_size=1000, length=length, rows=100, median=1e9, sigma=0).tokens(range(100))
    assert tokens.shape == (100, length)
    counts = np.bincount(tokens.ravel().astype(np.int64), minlength=1000)
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert len(counts) == 1000
    assert abs(chi_squared - 999) < 4 * math.sqrt(2 * 999)


def test_any_number_of_rows_takes_no_memory() -> None:
    split = rows_of(length=64, rows=10**9)
    assert split.tokens([10**9 - 1]).any()
    with pytest.raises(IndexError, match="row 1000000000 is not in"):
        split.segments([10**9])


@given(settings(), st.sampled_from(KINDS))
def test_no_segment_is_longer_than_the_longest_that_may_be(chosen: dict, kind: str) -> None:
    split = rows_of(kind, **chosen)
    assert split.segments(range(40)).length.max() <= split.longest_segment() <= split.length


def test_the_longest_segment_is_known_where_all_are_equal() -> None:
    assert rows_of(length=100, median=30, sigma=0).longest_segment() == 30
    assert rows_of(length=100, median=300, sigma=0).longest_segment() == 100
    assert rows_of("preference", length=100, median=300, sigma=0).longest_segment() == 98


def test_the_digest_is_of_the_settings() -> None:
    def digest(kind: str = "sft", vocab_size: int = VOCAB, **changes: Any) -> str:
        return open_synthetic(SyntheticConfig(length=64, **changes), kind, vocab_size).digest

    changes = [{"rows": 5}, {"median": 9}, {"sigma": 0}, {"targets": 0.25}, {"held_out": 1}, {"seed": 1}]
    assert digest() == digest()
    others = [digest("preference"), digest(vocab_size=49), *(digest(**change) for change in changes)]
    assert len({digest(), *others}) == 1 + len(others)


def test_rows_too_short_for_a_pair_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.synthetic\.length: a pair does not fit 3 tokens; wanted >= 4"):
        rows_of("preference", length=3)
    assert rows_of("preference", length=4).targets([0]) == [2]


def make_config(output: Path, task: str = "pretrain", model: Any = None, **changes: Any) -> RunConfig:
    synthetic = {"length": 32, "rows": 40, "median": 6, "held_out": 4} | changes.pop("synthetic", {})
    run = {
        "task": task, "model": {"from_config": LLAMA} if model is None else model, "data": {"synthetic": synthetic},
        "output": output, "batch": {"tokens": 5 * 32, "micro_rows": 2}, "train": {"steps": 12, "seed": 3},
        "optim": {"lr": 1e-3}, "save": {"every": 3},
    }  # fmt: skip
    return RunConfig.model_validate(run | changes)


FIRST_LOSS = {"pretrain": math.log(VOCAB), "sft": math.log(VOCAB), "dpo": math.log(2), "orpo": None}


@pytest.mark.parametrize("task", FIRST_LOSS)
def test_every_task_trains_on_them_and_resumes_bit_for_bit(tmp_path: Path, task: str) -> None:
    result = fit(make_config(tmp_path / "whole", task))
    first = read_metrics(tmp_path / "whole")[1]["loss"]
    assert first == pytest.approx(FIRST_LOSS[task] or first, rel=0.02)
    assert math.isfinite(first)
    assert result.eval_loss is not None
    config = make_config(tmp_path / "run", task)
    for step in (4, 8):
        interrupt(config, step)
    assert fit(config).resumed_from is not None
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"seed": 1}, {"median": 7}, {"rows": 41}, {"vocab_size": 20}])
def test_other_rows_are_another_run(tmp_path: Path, change: dict) -> None:
    fit(make_config(tmp_path / "run", train={"steps": 1}))
    with pytest.raises(ConfigError, match="dataset digest"):
        fit(make_config(tmp_path / "run", train={"steps": 2}, synthetic=change))


def test_the_vocabulary_is_the_models_unless_it_is_given(tmp_path: Path) -> None:
    nameless = {key: value for key, value in LLAMA.items() if key != "vocab_size"}

    def largest(**changes: Any) -> int:
        return open_rows(make_config(tmp_path, **changes)).tokenizer.max_id

    assert largest() == VOCAB - 1
    assert largest(synthetic={"vocab_size": 20}) == 19
    assert largest(model={"from_config": nameless}) == 32_000 - 1  # of transformers' LlamaConfig


def test_the_vocabulary_of_a_folder_is_that_of_its_config(tmp_path: Path) -> None:
    from llmt_train.model.load import load_model

    load_model({"from_config": LLAMA | {"vocab_size": 70}}).save_pretrained(tmp_path / "model")
    assert open_rows(make_config(tmp_path, model=str(tmp_path / "model"))).tokenizer.max_id == 69
    with pytest.raises(ConfigError, match=r"no_model: its config\.json cannot be read"):
        open_rows(make_config(tmp_path, model=str(tmp_path / "no_model")))


def test_a_fresh_model_has_the_vocabulary_of_the_rows(tmp_path: Path) -> None:
    nameless = {key: value for key, value in LLAMA.items() if key != "vocab_size"}
    result = fit(
        make_config(
            tmp_path, model={"from_config": nameless}, synthetic={"vocab_size": 20, "held_out": 0}, train={"steps": 1}
        )
    )
    assert result.loss == pytest.approx(math.log(20), rel=0.02)


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"id {VOCAB}.*{VOCAB} embedding rows"):
        fit(make_config(tmp_path, synthetic={"vocab_size": VOCAB + 1}))


def test_positions_must_serve_the_longest_document_that_may_be_drawn(tmp_path: Path) -> None:
    model = {"from_config": LLAMA | {"max_position_embeddings": 8}}
    with pytest.raises(ConfigError, match="8 positions"):
        fit(make_config(tmp_path / "refused", model=model))
    assert fit(make_config(tmp_path / "run", model=model, synthetic={"sigma": 0}, train={"steps": 1})).steps == 1


def test_there_is_no_place_for_a_precomputed_reference(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dpo\.reference: precomputed .* set it to model or none"):
        make_config(tmp_path, "dpo", dpo={"reference": "precomputed"})
    with pytest.raises(ConfigError, match=r"synthetic rows lie nowhere.*`dpo\.reference: model`"):
        precompute(make_config(tmp_path, "dpo"))


def test_samples_of_text_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample: synthetic rows have no tokenizer"):
        make_config(tmp_path, sample={"every": 5, "prompts": ["x"]})


def test_there_is_nothing_to_export(tmp_path: Path) -> None:
    fit(make_config(tmp_path / "run", train={"steps": 1}))
    assert not (tmp_path / "run" / "tokenizer").exists()
    with pytest.raises(ConfigError, match="synthetic rows, which have no tokenizer: there is nothing to export"):
        export(tmp_path / "run", tmp_path / "exported")
