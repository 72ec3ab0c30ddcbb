"""What is shown: aligned, honest in its rounding, and unable to steer a terminal."""

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from llmt_prep.report import as_json, count, histogram, percent, size, styled, table, wants_colour

STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Text(BaseModel):
    text: str


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(st.text())
def test_json_cannot_steer_a_terminal_and_says_the_same(text):
    shown = as_json(Text(text=text))
    assert not STEERING.search(shown)
    assert json.loads(shown) == {"text": text}


@given(st.lists(st.integers(0, 10**6), max_size=20))
def test_a_histogram_shows_every_count_above_0(counts):
    bars = histogram(counts)
    assert [bar == " " for bar in bars] == [not each for each in counts]
    assert all(bar == "█" for bar, each in zip(bars, counts, strict=True) if each == max(counts) > 0)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=20))
def test_a_larger_count_has_no_smaller_bar(counts):
    bars = [bar for _, bar in sorted(zip(counts, histogram(counts), strict=True))]
    assert bars == sorted(bars)


def test_a_table_is_aligned():
    assert table(["name", "n"], [["a", "1"], ["long name", "1 000"]]).splitlines() == [
        "name           n",
        "─────────  ─────",
        "a              1",
        "long name  1 000",
    ]


def test_a_table_without_rows_is_its_header():
    assert table(["a", "b"], []) == "a  b\n─  ─"


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0.00 %"), (0.57, "57.00 %"), (0.99999, "99.99 %"), (1, "100.00 %"), (1.5, "150.00 %")]
)
def test_nothing_below_1_reads_100_percent(value, shown):
    assert percent(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(0, "0"), (999, "999"), (1234567, "1 234 567"), (-1000, "-1 000")])
def test_counts_have_their_thousands_apart(value, shown):
    assert count(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")]
)
def test_sizes_are_decimal(value, shown):
    assert size(value) == shown


@pytest.mark.parametrize(
    ("variables", "stream", "wanted"),
    [
        ({}, io.StringIO(), False),
        ({}, Terminal(), True),
        ({"NO_COLOR": "1"}, Terminal(), False),
        ({"NO_COLOR": ""}, Terminal(), True),
        ({"FORCE_COLOR": "1"}, io.StringIO(), True),
        ({"FORCE_COLOR": ""}, io.StringIO(), False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, Terminal(), False),
        ({"TERM": "dumb"}, Terminal(), False),
    ],
)
def test_colour_is_for_terminals_and_for_who_asks(variables, stream, wanted, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wants_colour(stream) is wanted


def test_every_line_has_its_own_style():
    assert styled("a\n\nb", 2, 7) == "\x1b[2;7ma\x1b[0m\n\n\x1b[2;7mb\x1b[0m"
