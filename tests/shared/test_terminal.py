"""Text from data cannot steer a terminal."""

import re

from hypothesis import given
from hypothesis import strategies as st

from llmt_shared.terminal import escaped

STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@given(st.text())
def test_escaped_text_cannot_steer_a_terminal(text):
    assert not STEERING.search(escaped(text))


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])))
def test_plain_text_is_left_alone(text):
    assert escaped(text) == text


def test_line_feeds_and_tabs_are_marked_and_kept():
    assert escaped("a\n\tb") == "a⏎\n→\tb"


def test_codes_name_the_character():
    assert escaped("\x1b[31m\x9b\u202e") == "\\x1b[31m\\x9b\\u202e"
