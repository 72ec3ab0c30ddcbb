"""Characters to tokens: against looking at every token by itself."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep.chat.offsets import Extents
from llmt_prep.chat.targets import target_runs


@st.composite
def cases(draw):
    """Texts as borders of tokens (of any width, 0 too), and spans in them that ascend."""
    borders, spans = [], []
    for text in range(draw(st.integers(1, 4))):
        widths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
        ends = np.cumsum(widths).tolist()
        borders.append(list(zip([0, *ends[:-1]], ends, strict=True)))
        cuts = sorted(draw(st.lists(st.integers(0, ends[-1]), max_size=6)))
        spans += [(text, *pair) for pair in zip(cuts[::2], cuts[1::2], strict=False)]
    return borders, spans


def runs_of(borders, spans):
    sizes = [tokens[-1][1] for tokens in borders]
    text = np.cumsum([0, *sizes])
    begin, end = (
        np.array([text[number] + token[side] for number, tokens in enumerate(borders) for token in tokens])
        for side in (0, 1)
    )
    first = np.cumsum([0, *map(len, borders)])[:-1]
    table = np.array(spans, np.int64).reshape(-1, 3)
    return target_runs(Extents(begin, end, text, True), first, table[:, 0], table[:, 1:])


def is_inside(token, span):
    return max(token[0], span[0]) < min(token[1], span[1])


@given(cases())
def test_a_token_is_a_target_when_a_character_of_it_is_in_a_span(case):
    borders, spans = case
    runs = runs_of(borders, spans)
    found = {
        (text, token)
        for text, start, length in zip(runs.text, runs.start, runs.length, strict=True)
        for token in range(start, start + length)
    }
    wanted = {
        (text, token)
        for text, tokens in enumerate(borders)
        for token, extent in enumerate(tokens)
        if token and any(mine == text and is_inside(extent, span) for mine, *span in spans)
    }
    empty = {(text, n) for text, tokens in enumerate(borders) for n, (begin, end) in enumerate(tokens) if begin == end}
    assert found - empty == wanted  # a token of no characters goes with those around it


@given(cases())
def test_runs_ascend_and_share_no_token(case):
    runs = runs_of(*case)
    assert (runs.length > 0).all()
    assert (runs.start > 0).all()
    ends = runs.start + runs.length
    is_same = runs.text[1:] == runs.text[:-1]
    assert (runs.start[1:][is_same] >= ends[:-1][is_same]).all()
    assert (np.diff(runs.text) >= 0).all()


def test_what_lies_over_the_border_of_a_span_is_counted():
    borders = [[(0, 3), (3, 6), (6, 9), (9, 12)]]
    assert runs_of(borders, [(0, 4, 8)]).straddling.tolist() == [2]
    assert runs_of(borders, [(0, 3, 8)]).straddling.tolist() == [1]
    assert runs_of(borders, [(0, 3, 9)]).straddling.tolist() == [0]


def test_two_spans_that_meet_in_one_token_give_it_once():
    runs = runs_of([[(0, 2), (2, 6), (6, 8)]], [(0, 2, 3), (0, 5, 8)])
    assert (runs.start.tolist(), runs.length.tolist()) == ([1, 2], [1, 1])
