"""Rows get the spans of what lies in them, compared with a mask that is cut token by token."""

import tempfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_chats import Chat, chats, random_chats, write_chats

from llmt_prep import corpus as corpora
from llmt_prep.corpus import Corpus
from llmt_prep.gather import Segments
from llmt_prep.spans import RowSpans, spans_of_rows

Piece = tuple[int, int, int]
"""Document, offset in it, and length."""
L = 40


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Chat], list[int], list[list[Piece]]]:
    """Chats, how they are cut into units, and rows of any pieces of them, with repeats."""
    found = draw(chats(1, max_length=30))
    units = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        row: list[Piece] = []
        for document in draw(st.lists(st.integers(0, len(found) - 1), min_size=1, max_size=6)):
            offset = draw(st.integers(0, len(found[document][0].tokens) - 1))
            free = L - sum(length for _, _, length in row)
            length = min(free, draw(st.integers(1, len(found[document][0].tokens) - offset)))
            row += [(document, offset, length)] if length else []
        rows.append(row)
    return found, units, rows


def as_segments(corpus: Corpus, rows: list[list[Piece]]) -> Segments:
    document, offset, length = (np.array(column) for column in zip(*chain(*rows), strict=True))
    lengths = corpus.lengths(0, corpus.num_documents)
    address = (np.cumsum(lengths) - lengths)[document] + offset
    per_row = np.array([len(row) for row in rows])
    return Segments(per_row, length.astype(np.uint32), offset.astype(np.uint32), document, address)


def mask_of(spans: RowSpans, num_rows: int) -> list[list[bool]]:
    """Which tokens of rows lie in a span; each in at most one."""
    held = np.zeros((num_rows, L), int)
    row = np.repeat(np.arange(num_rows), spans.per_row)
    for number, start, length in zip(row, spans.start, spans.length, strict=True):
        held[number, start : start + length] += 1
    assert held.max(initial=0) <= 1
    return [[bool(token) for token in tokens] for tokens in held]


def naive_mask(found: list[Chat], row: list[Piece]) -> list[bool]:
    """A segment's first token is never a target, whatever it is in its document."""
    pieces = [found[document][0].is_target[offset : offset + length] for document, offset, length in row]
    mask = [flag and place > 0 for piece in pieces for place, flag in enumerate(piece)]
    return mask + [False] * (L - len(mask))


@settings(max_examples=40)
@given(cases())
def test_the_spans_of_rows_are_the_targets_of_their_pieces(case):
    found, units, rows = case
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_chats(Path(folder), [found], units)
        spans = spans_of_rows(as_segments(corpus, rows), L, corpus)
        corpora.close_units()
    assert mask_of(spans, len(rows)) == [naive_mask(found, row) for row in rows]
    assert (spans.start.dtype, spans.length.dtype) == (np.uint32, np.uint32)
    assert (spans.length >= 1).all()


@settings(max_examples=20)
@given(cases())
def test_a_span_lies_in_the_segment_that_it_names_and_spans_ascend(case):
    found, units, rows = case
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_chats(Path(folder), [found], units)
        spans = spans_of_rows(as_segments(corpus, rows), L, corpus)
        corpora.close_units()
    starts = [sum(n for _, _, n in row[:place]) for row in rows for place in range(len(row))]
    lengths = [n for row in rows for _, _, n in row]
    row = np.repeat(np.arange(len(rows)), spans.per_row)
    for segment, start, length in zip(spans.segment, spans.start, spans.length, strict=True):
        assert starts[segment] < start  # so it does not hold the segment's first token
        assert start + length <= starts[segment] + lengths[segment]
    order = list(zip(row.tolist(), spans.start.tolist(), strict=True))
    assert order == sorted(order)


def test_rows_without_a_target_have_no_span(tmp_path: Path) -> None:
    found = random_chats(4, 1, 20, seed=0)
    corpus = write_chats(tmp_path, [found], 2)
    spans = spans_of_rows(as_segments(corpus, [[(0, 0, 1)], [(3, 0, 1), (1, 0, 1)]]), L, corpus)
    assert spans.per_row.tolist() == [0, 0]
    assert (len(spans.start), len(spans.length), len(spans.segment)) == (0, 0, 0)


def test_many_units_are_read_with_few_files_open(tmp_path: Path) -> None:
    """A process may have only 256 on some systems, and a unit stays open when it was read."""
    descriptors = Path("/dev/fd")
    if not descriptors.exists():
        pytest.skip("this system does not list a process's files")
    found = random_chats(30, 1, 20, seed=0)
    corpus = write_chats(tmp_path, [found], 1)
    rows = [[(document, 0, len(chat[0].tokens))] for document, chat in enumerate(found)]
    before = len(list(descriptors.iterdir()))
    spans_of_rows(as_segments(corpus, rows), L, corpus)
    for unit in range(len(corpus.units)):
        assert corpus.open_unit(unit).records[0] == 0
        assert corpus.open_unit(unit).tokens.size
    assert len(list(descriptors.iterdir())) - before <= 128
    corpora.close_units()
