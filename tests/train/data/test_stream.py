"""The stream of a run: every row where the order says, the same number of micro-batches in every step."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from train.tiny_dataset import write_dataset

from llmt_shared.dataset import Split, open_dataset
from llmt_shared.errors import ConfigError, DataError
from llmt_shared.order import rows as epoch_rows
from llmt_train.config import BatchConfig, TrainConfig
from llmt_train.data import stream as data
from llmt_train.data.batch import PackedBatch
from llmt_train.data.stream import (
    Plan,
    Prefetched,
    count,
    eval_batches,
    plan_run,
    read_ahead,
    read_batch,
    rows_consumed,
    rows_of_step,
    train_batches,
)

LENGTH, NUM_ROWS = 16, 24


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return open_dataset(write_dataset(tmp_path_factory.mktemp("data") / "tiny", length=LENGTH, num_rows=NUM_ROWS)).train


def make_plan(split: Split, rows: int = 5, micro_rows: int = 2, epochs: float | None = None, steps: int = 7) -> Plan:
    train = TrainConfig(epochs=epochs) if epochs else TrainConfig(steps=steps)
    return plan_run(split, BatchConfig(tokens=rows * LENGTH, micro_rows=micro_rows), train)


def row_tokens(batch: PackedBatch) -> np.ndarray:
    return batch.input_ids[0].numpy().reshape(-1, LENGTH)


def test_the_arithmetic_of_a_run(split: Split) -> None:
    plan = make_plan(split, rows=5, micro_rows=2, epochs=2)
    assert (plan.rows_per_step, plan.accumulation, plan.total_rows, plan.total_steps) == (5, 3, 48, 10)
    assert make_plan(split, rows=5, steps=7).total_rows == 35
    assert make_plan(split, rows=2, micro_rows=8)[3:5] == (2, 1)  # a micro-batch is never larger than the step


def test_a_fraction_of_an_epoch_takes_that_many_rows(split: Split) -> None:
    assert make_plan(split, rows=4, epochs=0.5).total_rows == 12


@pytest.mark.parametrize(("tokens", "legal"), [(LENGTH * 3 + 1, "48 and 64"), (LENGTH * 2 - 1, "16 and 32"), (3, "16")])
def test_a_step_that_cuts_a_row_is_refused_with_the_nearest_legal_values(split: Split, tokens: int, legal: str) -> None:
    with pytest.raises(ConfigError, match=f"row length 16; nearest legal values: {legal}$"):
        plan_run(split, BatchConfig(tokens=tokens), TrainConfig(steps=1))


def test_rows_without_any_target_are_refused(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "x", validation_rows=0)
    chunk = path / "train" / "row_targets" / "c" / "0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(DataError, match="without a single target"):
        plan_run(open_dataset(path).train, BatchConfig(tokens=LENGTH), TrainConfig(steps=1))


@given(rows=st.integers(1, 60), epochs=st.floats(0.1, 3), seed=st.integers(0, 99))
def test_the_steps_together_are_the_epochs_permutations(split: Split, rows: int, epochs: float, seed: int) -> None:
    plan = plan_run(split, BatchConfig(tokens=rows * LENGTH), TrainConfig(epochs=epochs, seed=seed))
    steps = [rows_of_step(plan, step) for step in range(plan.total_steps)]
    assert all(len(step) == rows for step in steps[:-1])
    assert 0 < len(steps[-1]) <= rows
    endless = np.concatenate([epoch_rows(seed, epoch, 0, NUM_ROWS, NUM_ROWS) for epoch in range(4)])
    assert np.array_equal(np.concatenate(steps), endless[: round(epochs * NUM_ROWS)])


def test_micro_batches_hold_the_rows_of_their_step_in_order(split: Split) -> None:
    plan = make_plan(split, rows=5, micro_rows=2)
    batches = list(train_batches(split, plan))
    for step in range(plan.total_steps):
        part = batches[step * 3 : (step + 1) * 3]
        assert [len(row_tokens(batch)) for batch in part] == [2, 2, 1]
        found = np.concatenate([row_tokens(batch) for batch in part])
        assert np.array_equal(found, split.tokens(rows_of_step(plan, step)))


def test_a_short_last_step_is_filled_up_with_padding_without_targets(split: Split) -> None:
    plan = make_plan(split, rows=20, micro_rows=3, epochs=1)  # 24 rows: a step of 20 and one of 4
    batches = list(train_batches(split, plan))
    assert len(batches) == 2 * plan.accumulation == 14
    targets = [int((batch.labels != -100).sum()) for batch in batches[7:]]
    assert all(targets[:2])
    assert targets[2:] == [0] * 5
    assert all(not row_tokens(batch).any() for batch in batches[9:])


def test_the_denominator_counts_the_targets_of_the_whole_step(split: Split) -> None:
    plan = make_plan(split, rows=5, micro_rows=2)
    batches = list(train_batches(split, plan))
    for step in range(plan.total_steps):
        part = batches[step * 3 : (step + 1) * 3]
        counted = sum(int((batch.labels != -100).sum()) for batch in part)
        assert [batch.denominators for batch in part] == [{"targets": float(counted)}] * 3


@given(first=st.integers(0, 7))
def test_a_stream_from_a_later_step_is_the_rest_of_the_whole(split: Split, first: int) -> None:
    plan = make_plan(split)
    whole, rest = list(train_batches(split, plan)), list(train_batches(split, plan, first))
    assert len(rest) == len(whole) - first * plan.accumulation
    for a, b in zip(rest, whole[first * plan.accumulation :], strict=True):
        assert np.array_equal(a.input_ids, b.input_ids)
        assert np.array_equal(a.labels, b.labels)


@given(first=st.integers(0, 7), at_once=st.integers(1, 30))
def test_how_many_rows_are_ordered_at_once_changes_nothing(split: Split, first: int, at_once: int) -> None:
    plan = make_plan(split, rows=5, micro_rows=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_ORDERED_AT_ONCE", at_once)
        found = [row_tokens(batch) for batch in train_batches(split, plan, first)]
    assert len(found) == plan.total_steps - first
    for step, tokens in enumerate(found, first):
        assert np.array_equal(tokens, split.tokens(rows_of_step(plan, step)))


def test_a_micro_batch_of_a_step_is_what_its_rows_alone_give(split: Split) -> None:
    plan = make_plan(split, rows=5, micro_rows=2)
    batches = train_batches(split, plan)
    for step in range(plan.total_steps):
        rows, first = rows_of_step(plan, step), rows_consumed(plan, step)
        for start in (0, 2, 4):
            found, part = next(batches), rows[start : start + 2]
            alone = read_batch(split, part, count(split, rows), first_place=first + start)
            for name, value in alone._asdict().items():
                assert np.array_equal(getattr(found, name), value), name


class AskedFor:
    """A split that only notes which rows it is told about."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def will_need(self, rows: np.ndarray) -> None:
        self.rows += rows.tolist()


@given(st.lists(st.integers(1, 100), max_size=20))
def test_parts_come_in_order_when_at_least_64_rows_after_them_were_asked_for(sizes: list[int]) -> None:
    split, given_out, total = AskedFor(), 0, sum(sizes)
    parts = np.split(np.arange(total), np.cumsum(sizes)[:-1]) if sizes else []
    for found, wanted in zip(read_ahead(split, parts), parts, strict=True):  # type: ignore[arg-type]
        given_out += len(found)
        assert found.tolist() == wanted.tolist()
        assert split.rows == list(range(len(split.rows)))
        assert len(split.rows) >= min(total, given_out + 64)
        assert len(split.rows) <= given_out + 64 + max(sizes)


def test_rows_consumed_stops_at_the_end_of_the_run(split: Split) -> None:
    plan = make_plan(split, rows=5, epochs=1)
    assert [rows_consumed(plan, step) for step in range(6)] == [0, 5, 10, 15, 20, 24]


def test_evaluation_sees_every_row_once_in_order(split: Split) -> None:
    batches = list(eval_batches(split, 7))
    assert [len(row_tokens(batch)) for batch in batches] == [7, 7, 7, 3]
    assert np.array_equal(np.concatenate([row_tokens(batch) for batch in batches]), split.tokens(range(NUM_ROWS)))


def test_prefetching_changes_nothing(split: Split) -> None:
    plan = make_plan(split)
    stream = Prefetched(lambda: train_batches(split, plan), depth=2)
    for a, b in zip(stream, train_batches(split, plan), strict=True):
        assert np.array_equal(a.input_ids, b.input_ids)
    stream.close()


def test_an_error_of_the_thread_is_raised_where_the_items_are_taken() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise DataError("a bad chunk")

    items = iter(Prefetched(broken))
    assert next(items) == 1
    with pytest.raises(DataError, match="a bad chunk"):
        next(items)


def test_closing_early_ends_the_thread() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    stream = Prefetched(endless, depth=2)
    assert next(iter(stream)) == 1
    stream.close()
    assert not any(thread.name == "llmt-prefetch" for thread in threading.enumerate())


def test_no_more_than_the_depth_is_read_ahead() -> None:
    made: list[int] = []

    def counting() -> Iterator[int]:
        for index in range(100):
            made.append(index)
            yield index

    stream = Prefetched(counting, depth=3)
    next(iter(stream))
    time.sleep(0.3)
    assert len(made) <= 1 + 3 + 1  # taken, queued, and one in the thread's hand
    stream.close()


def test_asking_for_an_iterator_starts_nothing() -> None:
    """Lightning calls `iter` twice: once only to see whether it can."""
    stream = Prefetched(lambda: iter([1, 2]))
    iter(stream)
    assert list(stream) == [1, 2]
    with pytest.raises(RuntimeError, match="read once"):
        list(stream)
    stream.close()


@given(rows=st.integers(1, 9), micro_rows=st.integers(1, 4), ranks=st.integers(1, 4), first=st.integers(0, 3))
def test_ranks_together_take_the_rows_that_one_takes(
    split: Split, rows: int, micro_rows: int, ranks: int, first: int
) -> None:
    train = TrainConfig(steps=4)
    plan = plan_run(split, BatchConfig(tokens=rows * LENGTH, micro_rows=micro_rows), train, ranks)
    streams = [list(train_batches(split, plan, first, rank=rank)) for rank in range(ranks)]
    assert {len(stream) for stream in streams} == {(4 - first) * plan.accumulation}
    in_turn = [batch for batches in zip(*streams, strict=True) for batch in batches]
    places = [place for batch in in_turn for place in batch.row_places if batch.label_places.numel()]
    assert places == list(range(first * rows, 4 * rows))
    tokens = [row_tokens(batch) for batch in in_turn if batch.label_places.numel()]
    wanted = np.concatenate([rows_of_step(plan, step) for step in range(first, 4)])
    assert np.array_equal(np.concatenate(tokens), split.tokens(wanted))


@given(micro_rows=st.integers(1, 9), ranks=st.integers(1, 5))
def test_ranks_evaluate_every_row_once_in_equally_many_batches(split: Split, micro_rows: int, ranks: int) -> None:
    streams = [list(eval_batches(split, micro_rows, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert len({len(stream) for stream in streams}) == 1
    in_turn = [batch for batches in zip(*streams, strict=True) for batch in batches if batch.label_places.numel()]
    assert np.array_equal(np.concatenate([row_tokens(batch) for batch in in_turn]), split.tokens(range(NUM_ROWS)))
