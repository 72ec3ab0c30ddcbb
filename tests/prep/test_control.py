"""Control strings are found in texts, and control ids among ids."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep.control import control_id_finder, control_string_finder

STRINGS = ("<|endoftext|>", "<|im_start|>", "<s>", "</s>", "[SEP]", "日")
texts = st.lists(st.sampled_from([*STRINGS, "<|", "|>", "<", "s>", "[SE", " ", "word"]) | st.text(max_size=4)).map(
    "".join
)


@given(texts)
def test_the_finder_agrees_with_a_plain_search(text):
    found = control_string_finder(STRINGS)(text)
    assert (found is not None) == any(string in text for string in STRINGS)
    assert found is None or found in text


def test_a_longer_string_wins_over_its_own_start():
    assert control_string_finder(("<a", "<a>"))("x<a>") == "<a>"


def test_without_control_tokens_nothing_is_found():
    assert control_string_finder(())("anything") is None
    assert control_string_finder(("",))("anything") is None


@given(
    st.sets(st.integers(0, 40) | st.integers(2**32 - 3, 2**32 - 1), max_size=30),
    st.lists(st.integers(0, 50) | st.integers(2**32 - 5, 2**32 - 1), max_size=50),
)
def test_control_ids_are_found_where_they_are(control_ids, ids):
    places = control_id_finder(control_ids)(np.array(ids, np.uint32))
    assert places.tolist() == [place for place, token_id in enumerate(ids) if token_id in control_ids]
