"""The figures draw the numbers of the statistics, at the right places."""

import math
from itertools import pairwise

import pytest

from llmt_prep.html import plots
from llmt_prep.html.row_counts import Bin, Bins
from llmt_prep.lengths import Lengths
from llmt_prep.stats import SourceStats

HISTOGRAM = (0, 2, 8, 0, 0, 5)


def lengths(histogram: tuple[int, ...] = HISTOGRAM, p50: int = 6) -> Lengths:
    return Lengths(p5=2, p25=4, p50=p50, p75=40, p95=48, max=48 if any(histogram) else 0, histogram=histogram)


def source(share: float, wanted: float | None) -> SourceStats:
    return SourceStats(
        documents=1, segments=1, tokens=int(share * 1000), share=share, wanted_share=wanted, epochs=1.0,
        truncated=0, dropped_documents=0, dropped=0, lengths=lengths(),
    )  # fmt: skip


def test_the_mixture_shows_what_was_got_and_wanted():
    figure = plots.mixture({"web": source(0.75, 0.7), "code": source(0.25, 0.3)})
    got, wanted = figure.data
    assert (got.name, list(got.x), list(got.y)) == ("got", [75, 25], [0, 1])
    assert (wanted.name, list(wanted.x), list(wanted.y)) == ("wanted", [70, 30], [0, 1])
    assert figure.layout.yaxis.ticktext == ("web", "code")
    assert figure.layout.yaxis2.ticktext == ("75.00 %", "25.00 %")
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range == (1.5, -0.5)


def test_a_source_that_is_not_weighted_wants_nothing():
    assert list(plots.mixture({"a": source(1, None)}).data[1].x) == [0]


def test_bars_of_lengths_stand_on_the_line_of_their_source():
    figure = plots.small_histograms({"web": lengths(), "code": lengths((1, 0, 0, 0, 0, 0))}, 48, "tokens")
    bars = figure.data[0]
    assert list(bars.base) == [0] * 6 + [-1] * 6
    assert list(bars.x) == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5] * 2
    assert [height / 0.9 for height in bars.y] == pytest.approx([0, 2 / 8, 1, 0, 0, 5 / 8, 1, 0, 0, 0, 0, 0])


def test_bars_of_lengths_say_what_they_hold():
    hover = plots.small_histograms({"web": lengths()}, 48, "tokens").data[0].hovertext
    assert hover[2] == "<b>web</b><br>4 to 7 tokens<br>8 of them, 53.33 %"
    assert "<br>1 tokens<br>" in hover[0]
    assert "<br>32 to 48 tokens<br>" in hover[5]  # no segment is longer than a row


def test_the_median_stands_where_it_is_on_the_doubling_axis():
    figure = plots.small_histograms(
        {"a": lengths(p50=8), "none": lengths((0,) * 6, 0), "b": lengths(p50=6)}, 48, "tokens of a segment"
    )
    assert list(figure.data[1].x) == [3, math.log2(6)]
    assert [round(place) for place in figure.data[1].y] == [0, -2]


def test_a_longer_row_has_no_more_marks_than_fit_a_narrow_screen():
    for bits in range(1, 32):
        histogram = (1,) * bits
        axis = plots.small_histograms({"a": lengths(histogram)}, (1 << bits) - 1, "tokens").layout.xaxis
        assert len(axis.tickvals) == len(axis.ticktext) <= 8


def test_rows_are_drawn_as_shares_and_the_highest_bar_says_its_own():
    figure = plots.rows_by(Bins(None, (Bin(10, 19, 1), Bin(20, 29, 3))), "tokens in a row")
    bars = figure.data[0]
    assert (list(bars.x), list(bars.y)) == ([14.5, 24.5], [25, 75])
    assert bars.text == ("", "75.00 %")
    assert bars.hovertext == ("<b>10 to 19</b><br>1 row, 25.00 %", "<b>20 to 29</b><br>3 rows, 75.00 %")
    assert figure.layout.xaxis.title.text == "tokens in a row"


def test_only_one_of_several_highest_bars_is_labelled():
    figure = plots.rows_by(Bins(None, (Bin(10, 19, 3), Bin(20, 29, 3))), "tokens in a row")
    assert figure.data[0].text == ("50.00 %", "")


def test_gathered_rows_stand_apart_and_are_named():
    figure = plots.rows_by(Bins(Bin(0, 19, 1), (Bin(20, 29, 3), Bin(30, 39, 4))), "tokens in a row")
    assert list(figure.data[0].x) == [4.5, 24.5, 34.5]
    assert dict(zip(figure.layout.xaxis.tickvals, figure.layout.xaxis.ticktext, strict=True))[4.5] == "< 20"


def test_no_mark_of_the_axis_is_beside_the_one_of_gathered_rows():
    found = Bins(Bin(0, 19, 1), tuple(Bin(first, first, 1) for first in range(20, 60)))
    marks = sorted(plots.rows_by(found, "tokens in a row").layout.xaxis.tickvals)
    assert min(right - left for left, right in pairwise(marks)) >= 8


def test_no_rows_draw_nothing():
    assert list(plots.rows_by(Bins(None, ()), "tokens in a row").data[0].x or []) == []


def test_long_names_keep_both_ends_and_their_whole_in_what_hovers():
    name = "common_crawl_2024_high_quality"
    figure = plots.mixture({name: source(1, 1)})
    assert figure.layout.yaxis.ticktext == ("common_c…_quality",)
    assert name in figure.data[0].hovertext[0]


def test_a_name_is_no_markup_in_a_plot():
    """Plots understand some HTML, links among it."""
    name = "<a href='x'>"
    mixed, measured = (
        plots.mixture({name: source(1, 1)}),
        plots.small_histograms({name: lengths()}, 48, "tokens"),
    )
    for figure in (mixed, measured):
        assert "<a" not in figure.to_json().replace("\\u003c", "<")


def test_no_figure_brings_colours_of_its_own():
    figures = [plots.mixture({"a": source(1, 1)}), plots.small_histograms({"a": lengths()}, 48, "tokens")]
    for figure in [*figures, plots.rows_by(Bins(None, (Bin(0, 9, 1),)), "x")]:
        assert "color" not in figure.to_json()
