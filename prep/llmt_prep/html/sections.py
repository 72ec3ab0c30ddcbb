"""What the page shows, in order. A section is a function; a new one is one more of them in `sections`."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from llmt_prep.html import plots
from llmt_prep.html.row_counts import bins, row_counts
from llmt_prep.html.samples import Sample, samples
from llmt_prep.ledger import SourceLedger
from llmt_prep.lengths import Lengths
from llmt_prep.report import count, percent
from llmt_prep.stats import SourceStats, SplitStats, Stats
from llmt_prep.target_stats import TargetStats
from llmt_shared.dataset import Dataset


class Plot(NamedTuple):
    """A figure and what it shows, for those who cannot see it."""

    figure: Any
    label: str


class Table(NamedTuple):
    """Cells as they are shown; the first column names the line."""

    caption: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]


class Section(NamedTuple):
    """A heading, a sentence on how to read what follows, and what follows."""

    title: str
    text: str
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()


def sections(dataset: Dataset, stats: Stats) -> Iterator[Section]:
    """Yield the page's sections."""
    yield _mixture(stats)
    yield _lengths(stats)
    yield _rows(dataset, stats)
    if stats.splits["train"].trained is not None:
        yield _trained(stats, stats.splits["train"].trained)
    yield _sources(stats)
    yield _ledger(stats)
    yield _samples(dataset)


_MOST_DRAWN = 200
"""Sources in a plot; more make it too high to be read. Tables have all."""


def _mixture(stats: Stats) -> Section:
    sources = _by_share(stats.splits["train"])
    return Section(
        "Mixture",
        "How the training tokens are shared among the sources: what each got, and what the mix asked for."
        + _who_is_drawn(sources),
        plots=[Plot(plots.mixture(_drawn(sources)), "Share of the tokens of each source, wanted and got")],
    )


def _lengths(stats: Stats) -> Section:
    split, sources = stats.splits["train"], _by_share(stats.splits["train"])
    lengths = {name: source.lengths for name, source in sources.items()}
    if len(lengths) > 1:
        lengths = {"all sources": split.lengths} | lengths
    figure = plots.small_histograms(_drawn(lengths), stats.length, "tokens of a segment")
    return Section(
        "Segment lengths",
        "A segment is what attention sees as a whole: a document, or a piece of one that is longer than a row. "
        "The length doubles from bar to bar; a source's highest bar fills its line." + _who_is_drawn(sources),
        plots=[Plot(figure, "Histogram of segment lengths of each source")],
        tables=[Table("Tokens of a segment", _QUANTILES, [_length_line(name, each) for name, each in lengths.items()])],
    )


def _by_share(split: SplitStats) -> dict[str, SourceStats]:
    """The sources, the largest first."""
    return dict(sorted(split.sources.items(), key=lambda item: -item[1].share))


def _drawn(sources: Mapping[str, Any]) -> dict[str, Any]:
    return dict(islice(sources.items(), _MOST_DRAWN))


def _who_is_drawn(sources: Mapping[str, Any]) -> str:
    return f" Drawn are the {_MOST_DRAWN} largest of {count(len(sources))}." if len(sources) > _MOST_DRAWN else ""


_QUANTILES = ("source", "5 % up to", "25 % up to", "median", "75 % up to", "95 % up to", "longest")


def _length_line(name: str, lengths: Lengths) -> list[str]:
    numbers = (lengths.p5, lengths.p25, lengths.p50, lengths.p75, lengths.p95, lengths.max)
    return [name, *map(count, numbers)]


def _rows(dataset: Dataset, stats: Stats) -> Section:
    split, counts = stats.splits["train"], row_counts(dataset.train)
    return Section(
        "Rows",
        f"{count(split.rows)} training rows of {count(stats.length)} places are {percent(split.fill)} full. "
        f"A target is a token that counts in the loss: {percent(split.targets / max(1, split.tokens))} of the tokens.",
        plots=[
            Plot(plots.rows_by(bins(counts.tokens), "tokens in a row"), "Histogram of the tokens in a row"),
            Plot(plots.rows_by(bins(counts.targets), "targets in a row"), "Histogram of the targets in a row"),
        ],
        tables=[_splits_table(stats)],
    )


def _trained(stats: Stats, trained: TargetStats) -> Section:
    lengths = {"spans of targets": trained.lengths}
    pairs = trained.pairs
    if pairs is not None:
        lengths |= {"prompt": pairs.prompt, "chosen side": pairs.chosen, "rejected side": pairs.rejected}
    text = (
        f"{percent(trained.share)} of the tokens are targets, in {count(trained.spans)} spans: turns that are trained "
        f"on. {percent(trained.ends_turn)} of them end with the token that ends a turn."
    )
    return Section(
        "Turns and pairs" if pairs is not None else "Turns",
        text + (f" Both sides of {count(pairs.pairs)} pairs lie in one row each." if pairs is not None else ""),
        plots=[
            Plot(
                plots.small_histograms(lengths, stats.length, "tokens"),
                "Histogram of the lengths of what is trained on",
            )
        ],
        tables=[Table("Tokens", _QUANTILES, [_length_line(name, each) for name, each in lengths.items()])],
    )


def _splits_table(stats: Stats) -> Table:
    header = ["split", "rows", "documents", "segments", "tokens", "targets", "padding", "fill", "rows with repeats"]
    return Table("Splits", header, [_split_line(name, split) for name, split in stats.splits.items()])


def _split_line(name: str, split: SplitStats) -> list[str]:
    numbers = (split.rows, split.documents, split.segments, split.tokens, split.targets, split.padding)
    return [name, *map(count, numbers), percent(split.fill), count(split.rows_with_repeats)]


def _sources(stats: Stats) -> Section:
    header = ["source", "documents", "segments", "tokens", "share", "wanted", "epochs", "truncated", "dropped"]
    return Section(
        "Sources",
        "Documents count as often as they are in the rows. Where one is longer than a row, its tokens may be truncated "
        "or dropped.",
        tables=[
            Table(f"Sources of {name}", header, [_source_line(source, each) for source, each in split.sources.items()])
            for name, split in stats.splits.items()
        ],
    )


def _source_line(name: str, source: SourceStats) -> list[str]:
    return [
        name,
        *map(count, (source.documents, source.segments, source.tokens)),
        percent(source.share),
        "-" if source.wanted_share is None else percent(source.wanted_share),
        "-" if source.epochs is None else f"{source.epochs:.3f}",
        *map(count, (source.truncated, source.dropped)),
    ]


def _ledger(stats: Stats) -> Section:
    wrong = stats.ledger_mistakes
    return Section(
        "Ledger",
        "Where every record and token went. "
        + (f"These sums do not close: {'; '.join(wrong)}." if wrong else "All sums close."),
        tables=[_records_table(stats), _tokens_table(stats), *(_split_table(stats, name) for name in stats.splits)],
    )


def _records_table(stats: Stats) -> Table:
    header = ["source", "files", "records", "documents", "empty", "quarantined", "left out", "with control strings"]

    def line(name: str, books: SourceLedger) -> list[str]:
        numbers = (books.files, books.records, books.documents.documents, books.empty, books.quarantined)
        return [name, *map(count, (*numbers, sum(books.left_out.values()), books.with_control_strings))]

    lines = [line(name, books) for name, books in stats.ledger.sources.items()]
    return Table("records = documents + empty + quarantined + left out", header, lines)


def _tokens_table(stats: Stats) -> Table:
    header = ["source", "tokens", "held out", "never selected", "selected"]
    lines = [
        [
            name,
            *(count(each.tokens) for each in (books.documents, books.held_out, books.never_selected, books.selected)),
        ]
        for name, books in stats.ledger.sources.items()
    ]
    return Table("tokens of the documents = held out + never selected + selected", header, lines)


def _split_table(stats: Stats, split: str) -> Table:
    header = ["source", "selected", "in rows", "truncated", "dropped"]
    amounts = {name: getattr(books, split) for name, books in stats.ledger.sources.items()}
    lines = [
        [name, *map(count, (each.selected.tokens, each.in_rows, each.truncated, each.dropped.tokens))]
        for name, each in amounts.items()
    ]
    return Table(f"{split}: selected with repeats = in rows + truncated + dropped", header, lines)


def _samples(dataset: Dataset) -> Section:
    return Section(
        "Sample rows",
        "Rows from the beginning to the end of the dataset, as training sees them. Hovering over a token shows its id.",
        samples=list(samples(dataset)),
    )
