"""Some rows to look at, cut to what a page can hold."""

from collections.abc import Iterator
from typing import NamedTuple

from llmt_prep.inspection import RowView, SegmentView, TokenRun, inspect_row
from llmt_prep.report import count
from llmt_shared.dataset import Dataset
from llmt_shared.terminal import escaped

_ROWS = {"train": 4, "validation": 1}
_MOST_SEGMENTS = 12
_MOST_OF_SEGMENT = 600  # tokens


class Token(NamedTuple):
    """One token as it is shown."""

    text: str
    """Control characters made visible; not yet escaped for HTML."""
    ids: str
    style: str
    """CSS classes: ``t`` target, ``x`` control token."""


class Piece(NamedTuple):
    """A segment, or its beginning."""

    number: int
    side: str
    """``chosen`` or ``rejected``, of a preference pair; else empty."""
    source: str
    place: str
    offset: int
    length: int
    tokens: tuple[Token, ...]
    left_out: int
    """Tokens that are not shown."""


class Sample(NamedTuple):
    """A row."""

    title: str
    split: str
    row: int
    strip: tuple[tuple[str, int], ...]
    """Source and length of each segment of the row."""
    padding: int
    pieces: tuple[Piece, ...]
    left_out: int
    """Segments that are not shown."""


def samples(dataset: Dataset) -> Iterator[Sample]:
    """Yield rows that lie evenly from the first to the last of each split."""
    for name, split in (("train", dataset.train), ("validation", dataset.validation)):
        if split is not None:
            wanted = min(_ROWS[name], len(split))
            for row in (index * (len(split) - 1) // max(1, wanted - 1) for index in range(wanted)):
                yield _sample(inspect_row(dataset, name, row))


def _sample(view: RowView) -> Sample:
    segments = "1 segment" if len(view.segments) == 1 else f"{count(len(view.segments))} segments"
    padding = f"{count(view.padding)} padding" if view.padding else "full"
    return Sample(
        title=f"{view.split} row {count(view.row)}: {segments}, {count(view.targets)} targets, {padding}",
        split=view.split,
        row=view.row,
        strip=tuple((segment.source, segment.length) for segment in view.segments),
        padding=view.padding,
        pieces=tuple(map(_piece, view.segments[:_MOST_SEGMENTS])),
        left_out=max(0, len(view.segments) - _MOST_SEGMENTS),
    )


def _piece(segment: SegmentView) -> Piece:
    shown, rest = segment.tokens[:_MOST_OF_SEGMENT], segment.tokens[_MOST_OF_SEGMENT:]
    return Piece(
        number=segment.number,
        side=segment.side or "",
        source=segment.source,
        place=escaped(segment.place),
        offset=segment.offset,
        length=segment.length,
        tokens=tuple(map(_token, shown)),
        left_out=sum(len(run.ids) for run in rest),
    )


def _token(run: TokenRun) -> Token:
    style = ("t" if run.targets else "") + (" x" if run.is_control else "")
    return Token(escaped(run.text), " ".join(map(str, run.ids)), style.strip())
