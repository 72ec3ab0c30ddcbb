"""Rows described by their segments, and the micro-batches of a step that takes them, cut and ordered in any way.

Shape legend: n tokens of a segment, L tokens of a row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from train.tiny_models import VOCAB

from llmt_shared.segments import Spans
from llmt_train.data.batch import PackedBatch, collate

LENGTH = 40
NUM_SOURCES = 3


class Segment(NamedTuple):
    """One document, chat or side of a pair."""

    ids: NDArray[np.int64]
    is_target: NDArray[np.bool_]
    """[n]; what is said of the first token means nothing: nothing predicts it."""
    source: int = 0
    reference: float = 0.0
    """Log-probability of its targets under some reference."""


class Row(NamedTuple):
    """L tokens: segments, then padding."""

    segments: tuple[Segment, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    """Chosen and rejected side, as they are counted in the row."""


def document_rows(seed: int = 0) -> list[Row]:
    """Rows whose every token is a target; the targets are very unequal: 39, 10, 0, 31, 1, 29, 20."""
    random = np.random.default_rng(seed)
    lengths = [[40], [5, 7], [1, 1, 1], [19, 14], [2], [25, 6], [12, 10]]
    return [Row(tuple(_segment(random, n, np.ones(n, bool)) for n in each)) for each in lengths]


def chat_rows(seed: int = 0) -> list[Row]:
    """Rows with several runs of targets in a segment; some segments, and one row, have none."""
    random = np.random.default_rng(seed)
    lengths = [[40], [5, 7], [9], [19, 14], [2], [25, 6], [12, 10]]
    rows = []
    for index, each in enumerate(lengths):
        masks = [np.repeat(random.random(1 + n // 4) < (index != 2) * 0.6, 4)[:n] for n in each]
        rows.append(Row(tuple(_segment(random, len(mask), mask) for mask in masks)))
    return rows


def pair_rows(seed: int = 0) -> list[Row]:
    """Rows with 1, 3, 2, 1 and 2 pairs, whose sides have 1 to 14 targets and lie apart from one another."""
    random = np.random.default_rng(seed)
    sizes = [
        [(3, 14, 9)],  # a prompt, and the answers to it
        [(1, 2, 5), (2, 3, 1), (4, 6, 2)],
        [(5, 1, 7), (2, 8, 4)],
        [(2, 1, 1)],
        [(6, 3, 4), (1, 9, 7)],
    ]
    return [_pair_row(random, each) for each in sizes]


def _pair_row(random: np.random.Generator, sizes: Sequence[tuple[int, int, int]]) -> Row:
    sides = []
    for prompt_length, *answers in sizes:
        prompt, source = random.integers(3, VOCAB, prompt_length), int(random.integers(NUM_SOURCES))
        for length in answers:
            mask = np.arange(prompt_length + length) >= prompt_length
            side = _segment(random, len(mask), mask, source)
            side.ids[:prompt_length] = prompt
            sides.append(side)
    order = random.permutation(len(sides))
    place = np.argsort(order).tolist()
    pairs = tuple((place[2 * pair], place[2 * pair + 1]) for pair in range(len(sizes)))
    return Row(tuple(sides[i] for i in order), pairs)


def _segment(random: np.random.Generator, n: int, is_target: NDArray[np.bool_], source: int | None = None) -> Segment:
    chosen = int(random.integers(NUM_SOURCES)) if source is None else source
    return Segment(random.integers(3, VOCAB, n), is_target, chosen, -3.0 * n * random.random())


def step_of(
    rows: Sequence[Row], sizes: Sequence[int], *, order: Sequence[int] | None = None, **how: Any
) -> list[PackedBatch]:
    """Return the micro-batches of a step.

    Args:
        rows: all rows of the step; the place of each in the run's order is its index here.
        sizes: rows of each micro-batch; 0 makes one of padding.
        order: in which they fall into the micro-batches.
        how: see `pack`.
    """
    places = list(range(len(rows))) if order is None else list(order)
    ends = np.cumsum(sizes)
    assert ends[-1] == len(rows)
    denominators = count(rows)
    return [pack(rows, places[end - size : end], denominators, **how) for size, end in zip(sizes, ends, strict=True)]


def count(rows: Sequence[Row]) -> dict[str, float]:
    """What a step with these rows divides by."""
    segments = [segment for row in rows for segment in row.segments]
    chosen = [row.segments[side] for row in rows for side, _ in row.pairs]
    counts = {
        "targets": sum(int(segment.is_target[1:].sum()) for segment in segments),
        "pairs": len(chosen),
        "chosen_targets": sum(int(segment.is_target[1:].sum()) for segment in chosen),
        "chosen_labels": sum(len(segment.ids) - 1 for segment in chosen),
    }
    return {name: float(number) for name, number in counts.items()}


def pack(
    rows: Sequence[Row],
    places: Sequence[int],
    denominators: dict[str, float],
    *,
    all_targets: bool = False,
    with_chosen_prompts: bool = False,
    with_reference: bool = False,
) -> PackedBatch:
    """Lay rows end to end, as training reads them from the disk; no rows give padding.

    Args:
        rows: of the step.
        places: which of them.
        denominators: of the step.
        all_targets: give no spans, as text has none.
        with_chosen_prompts: see `collate`.
        with_reference: give the segments' own reference log-probabilities.
    """
    taken = [rows[place] for place in places] or [Row(())]
    segments = [segment for row in taken for segment in row.segments]
    has_pairs = any(row.pairs for row in rows)
    pairs, first = [], 0
    for row in taken:
        pairs += [(first + chosen, first + rejected) for chosen, rejected in row.pairs]
        first += len(row.segments)
    values = [[segments[side].reference for side in pair] for pair in pairs]
    return collate(
        np.stack([_tokens(row) for row in taken]),
        np.array([len(row.segments) for row in taken]),
        np.array([len(segment.ids) for segment in segments], np.int64),
        np.array([segment.source for segment in segments], np.int64),
        None if all_targets else _spans(taken),
        denominators,
        pairs=np.array(pairs, np.int64).reshape(-1, 2) if has_pairs else None,
        with_chosen_prompts=with_chosen_prompts,
        reference_logps=np.array(values, np.float64).reshape(-1, 2) if with_reference else None,
        row_places=tuple(places) or (0,),
    )


def _tokens(row: Row) -> NDArray[np.int64]:
    tokens = np.zeros(LENGTH, np.int64)
    ids = [token for segment in row.segments for token in segment.ids]
    tokens[: len(ids)] = ids
    return tokens


def _spans(rows: Sequence[Row]) -> Spans:
    """Runs of targets, which end where their segment does."""
    start, length = [], []
    for number, row in enumerate(rows):
        first = number * LENGTH
        for segment in row.segments:
            edges = np.diff(np.concatenate([[0], segment.is_target, [0]]).astype(int))
            start += (first + np.flatnonzero(edges == 1)).tolist()
            length += (np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)).tolist()
            first += len(segment.ids)
    return Spans(np.array(start, np.int64), np.array(length, np.int64))
