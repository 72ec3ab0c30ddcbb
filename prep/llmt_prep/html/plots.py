"""The plots of the page. They say where things are drawn; their colours are the style sheet's, for light and dark.

Names of sources are shortened in the middle where they would leave no room on a narrow screen; hovering shows them
whole. The order of the traces is their colour: first what is, then what it is compared with.
"""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from plotly.graph_objects import Bar, Figure

from llmt_prep.html.row_counts import Bin, Bins
from llmt_prep.lengths import Lengths
from llmt_prep.report import count, percent
from llmt_prep.stats import SourceStats

_LONGEST_NAME = 17
_TICKS = 5


def mixture(sources: Mapping[str, SourceStats]) -> Figure:
    """What each source got of the tokens as a bar, what the mix wants as a mark on it.

    Args:
        sources: of the training split, from the top of the plot.
    """
    places = list(range(len(sources)))
    hover = [_mixture_hover(name, source) for name, source in sources.items()]
    figure = Figure(layout=_layout(_height(len(sources), 34), "share of the tokens, %"))
    figure.add_bar(
        x=[100 * source.share for source in sources.values()], y=places, orientation="h", width=0.66,
        name="got", hovertext=hover, hoverinfo="text",
    )  # fmt: skip
    figure.add_scatter(
        x=[100 * (source.wanted_share or 0) for source in sources.values()], y=places, yaxis="y2",
        name="wanted", hovertext=hover, hoverinfo="text", **_upright_marks(len(sources)),
    )  # fmt: skip
    lines = {"tickvals": places, "range": [len(sources) - 0.5, -0.5], "showgrid": False, "zeroline": False}  # downwards
    shares = [percent(source.share) for source in sources.values()]
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(lines | {"ticktext": list(map(_shortened, sources))})
    return figure.update_layout(yaxis2=_AXIS | lines | {"overlaying": "y", "side": "right", "ticktext": shares})


def small_histograms(sources: Mapping[str, Lengths], row_length: int, axis: str) -> Figure:
    """A small histogram for each source, on one axis that doubles from mark to mark; a mark at the median.

    Args:
        sources: by the name that is shown, in the order of the plot.
        row_length: tokens.
        axis: what has so many tokens, such as ``tokens of a segment``.
    """
    figure = Figure(layout=_layout(_height(len(sources), 56), axis))
    figure.add_trace(_small_histograms(sources, row_length))
    known = [(_MIDDLE - place, lengths.p50) for place, lengths in enumerate(sources.values()) if lengths.max]
    figure.add_scatter(
        x=[math.log2(median) for _, median in known], y=[height for height, _ in known], name="median",
        hovertext=[f"median {count(median)} tokens" for _, median in known], hoverinfo="text",
        **_upright_marks(len(sources)),
    )  # fmt: skip
    buckets = row_length.bit_length()
    marks = list(range(0, buckets, -(-buckets // 8)))  # more would not fit a narrow screen
    figure.update_xaxes(tickvals=marks, ticktext=[count(1 << mark) for mark in marks], range=[-0.1, buckets])
    return figure.update_yaxes(
        tickvals=[_MIDDLE - place for place in range(len(sources))], ticktext=list(map(_shortened, sources)),
        range=[0.9 - len(sources), 1], showgrid=False, zeroline=False,
    )  # fmt: skip


def rows_by(found: Bins, what: str) -> Figure:
    """A histogram of the rows; the highest bar says its share.

    Args:
        found: of the rows.
        what: the numbers that are counted, for the axis: ``tokens in a row``.
    """
    bars = _placed(found)
    total = sum(each.rows for _, each in bars)
    highest = max(bars, key=lambda bar: bar[1].rows, default=None)
    figure = Figure(layout=_layout(300, what, top=24, right=28))
    figure.add_bar(
        x=[place for place, _ in bars], y=[100 * each.rows / total for _, each in bars], width=0.92 * found.width,
        text=[percent(bar[1].rows / total) if bar is highest else "" for bar in bars],
        textposition="outside", textangle=0, constraintext="none", cliponaxis=False,
        hovertext=[_bar_hover(each, total) for _, each in bars], hoverinfo="text", showlegend=False,
    )  # fmt: skip
    ticks = _ticks(found, bars[0][0]) if bars else []
    figure.update_xaxes(
        tickvals=[at for at, _ in ticks], ticktext=[text for _, text in ticks], tickangle=0, showgrid=False
    )
    return figure.update_yaxes(title_text="share of the rows, %", rangemode="tozero")


_AXIS: dict[str, Any] = {"automargin": True, "fixedrange": True, "ticklabelstandoff": 6, "ticklabeloverflow": "allow"}
"""A finger that moves over a plot scrolls the page: no axis is dragged."""
_MIDDLE = 0.45
"""Of a small histogram, above its base; the next base is 1 above."""


def _layout(height: int, x_title: str, top: int = 40, right: int = 12) -> dict[str, Any]:
    return {
        "template": {},  # plotly's own would bring its colours
        "height": height,
        "margin": {"l": 8, "r": right, "t": top, "b": 8},
        "hovermode": "closest",
        "dragmode": False,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top", "itemclick": False},
        "xaxis": _AXIS | {"title": {"text": x_title, "standoff": 10}},
        "yaxis": _AXIS,
    }


def _upright_marks(lines: int) -> dict[str, Any]:
    size = max(8, 17 - lines // 4)
    return {"mode": "markers", "marker": {"symbol": "line-ns", "size": size, "line": {"width": 3}}}


def _mixture_hover(name: str, source: SourceStats) -> str:
    shares = f"got {percent(source.share)}, wanted {percent(source.wanted_share or 0)}"
    return f"<b>{escape(name)}</b><br>{shares}<br>{count(source.tokens)} tokens"


def _height(lines: int, most: int) -> int:
    """Pixels: lines get lower as there are more, down to what a name needs."""
    return 116 + lines * max(22, most - lines)


def _small_histograms(sources: Mapping[str, Lengths], row_length: int) -> Bar:
    """All bars are one trace; the base of a bar is the place of its source."""
    bars = []
    for place, (name, lengths) in enumerate(sources.items()):
        top = max(1, *lengths.histogram)
        for bucket, segments in enumerate(lengths.histogram):
            hover = _bucket_hover(name, lengths, bucket, row_length)
            bars.append((bucket + 0.5, 0.9 * segments / top, -place, hover))
    x, y, base, hovers = zip(*bars, strict=True)
    return Bar(x=x, y=y, base=base, width=0.94, hovertext=hovers, hoverinfo="text", name="share")


def _bucket_hover(name: str, lengths: Lengths, bucket: int, row_length: int) -> str:
    lengths_of_bucket = _range(1 << bucket, min((2 << bucket) - 1, row_length))
    segments, total = lengths.histogram[bucket], max(1, sum(lengths.histogram))
    share = f"{count(segments)} of them, {percent(segments / total)}"
    return f"<b>{escape(name)}</b><br>{lengths_of_bucket} tokens<br>{share}"


def _placed(found: Bins) -> list[tuple[float, Bin]]:
    """The bars and where their middles are; what is gathered stands a bar's width away from the others."""
    bars = [((each.first + each.last) / 2, each) for each in found.bins]
    return [(bars[0][0] - 2 * found.width, found.below), *bars] if found.below else bars


def _ticks(found: Bins, first_place: float) -> list[tuple[float, str]]:
    """Where a few of the bins begin, the last among them, but not beside what is gathered, which has its own."""
    few = found.bins[:: -max(1, -(-len(found.bins) // _TICKS))]
    ticks = [(float(each.first), count(each.first)) for each in few]
    if not found.below:
        return ticks
    room = len(found.bins) * found.width / _TICKS
    apart = [tick for tick in ticks if tick[0] - first_place > room]
    return [*apart, (first_place, f"< {count(found.bins[0].first)}")]


def _bar_hover(bar: Bin, total: int) -> str:
    rows = "1 row" if bar.rows == 1 else f"{count(bar.rows)} rows"
    return f"<b>{_range(bar.first, bar.last)}</b><br>{rows}, {percent(bar.rows / total)}"


def _range(first: int, last: int) -> str:
    return count(first) if first >= last else f"{count(first)} to {count(last)}"


def _shortened(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return escape(name)
    half = (_LONGEST_NAME - 1) // 2
    return f"{escape(name[: _LONGEST_NAME - 1 - half])}…{escape(name[-half:])}"
