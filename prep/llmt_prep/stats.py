"""What is in a finished dataset: sources against what was wanted, lengths, fill, repeated documents, the ledger.

Segments are grouped block by block; what is kept between blocks is one counter for each source and length.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmt_prep import scan
from llmt_prep.companions import read_ledger
from llmt_prep.ledger import Ledger, SourceLedger, mistakes
from llmt_prep.lengths import QUANTILES, Lengths, summarized
from llmt_prep.report import count, histogram, percent, table
from llmt_prep.scan import Block
from llmt_prep.target_stats import TargetStats, target_stats
from llmt_prep.tokenizer import load_tokenizer
from llmt_shared.config import StrictModel
from llmt_shared.dataset import Dataset, Split
from llmt_shared.terminal import escaped

_SEGMENTS_AT_ONCE = 1 << 18


class SourceStats(StrictModel):
    """One source in one split."""

    documents: int
    """Each as often as it is in the rows."""
    segments: int
    tokens: int
    share: float
    """Of the split's tokens."""
    wanted_share: float | None
    """What the mix asks for; ``None`` for validation, which is not weighted."""
    epochs: float | None
    """Passes over the documents that may be trained on; ``None`` for validation."""
    truncated: int
    """Tokens cut from documents in the rows."""
    dropped_documents: int
    dropped: int
    """Tokens of documents that are longer than a row."""
    lengths: Lengths


class SplitStats(StrictModel):
    """One split."""

    rows: int
    documents: int
    segments: int
    tokens: int
    padding: int
    fill: float
    targets: int
    rows_with_repeats: int
    """Rows in which some token of a document lies twice; two pieces of a split document are no repeat."""
    lengths: Lengths
    trained: TargetStats | None
    """Of chats and pairs; ``None`` where every token is a target."""
    sources: dict[str, SourceStats]


class Stats(StrictModel):
    """The whole answer of `llmt-prep stats`."""

    path: str
    digest: str
    kind: str
    length: int
    """Tokens of a row."""
    splits: dict[str, SplitStats]
    ledger: Ledger
    ledger_mistakes: tuple[str, ...]
    """Sums that do not close; none in a sound dataset."""


def dataset_stats(dataset: Dataset) -> Stats:
    """Count what a dataset holds, from its arrays; what is no longer in them comes from the ledger.

    Raises:
        FormatError: a file is damaged.
    """
    ledger, length = read_ledger(dataset.folder, dataset.manifest), dataset.manifest.length
    splits = {"train": dataset.train} | ({"validation": dataset.validation} if dataset.validation is not None else {})
    return Stats(
        path=str(dataset.path),
        digest=dataset.digest,
        kind=dataset.manifest.kind,
        length=length,
        splits={name: _split_stats(name, split, dataset, ledger) for name, split in splits.items()},
        ledger=ledger,
        ledger_mistakes=tuple(mistakes(ledger, length)),
    )


def render(stats: Stats) -> str:
    """Return the statistics as text."""
    parts = [f"{escaped(stats.path)}  {stats.kind}  digest {stats.digest}"]
    for name, split in stats.splits.items():
        parts += ["", *_split_text(name, split, stats.length)]
    return "\n".join([*parts, "", *_ledger_text(stats)])


def _split_stats(name: str, split: Split, dataset: Dataset, ledger: Ledger) -> SplitStats:
    rows_at_once = max(1, _SEGMENTS_AT_ONCE * len(split) // max(1, split.num_segments))
    groups, repeats = _empty_groups(), 0
    for block in scan.blocks(split.arrays, rows_at_once):
        groups = _added(groups, _grouped(block))
        repeats += len(rows_with_repeats(block))
    tokens, places = _tokens(groups), len(split) * split.length
    return SplitStats(
        rows=len(split),
        documents=int(groups["documents"].sum()),
        segments=int(groups["segments"].sum()),
        tokens=tokens,
        padding=places - tokens,
        fill=tokens / max(1, places),
        targets=sum(int(part.sum(dtype=np.int64)) for part in _slices(split.row_targets)),
        rows_with_repeats=repeats,
        lengths=_lengths(groups, split.length),
        trained=_trained(split, dataset),
        sources={
            source: _source_stats(name, groups.filter(pl.col("source") == index), tokens, split.length, source, ledger)
            for index, source in enumerate(dataset.sources)
        },
    )


def _trained(split: Split, dataset: Dataset) -> TargetStats | None:
    kind = dataset.manifest.kind
    if kind == "pretrain":
        return None
    control = np.array(sorted(load_tokenizer(str(dataset.tokenizer_dir)).control_ids))
    return target_stats(split, control, has_pairs=kind == "preference")


def _source_stats(
    split: str, groups: pl.DataFrame, tokens_of_split: int, row_length: int, source: str, ledger: Ledger
) -> SourceStats:
    books = ledger.sources[source]
    amount = books.train if split == "train" else books.validation
    tokens, wanted = _tokens(groups), sum(each.wanted for each in ledger.sources.values())
    return SourceStats(
        documents=int(groups["documents"].sum()),
        segments=int(groups["segments"].sum()),
        tokens=tokens,
        share=tokens / max(1, tokens_of_split),
        wanted_share=books.wanted / max(1, wanted) if split == "train" else None,
        epochs=books.epochs if split == "train" else None,
        truncated=amount.truncated,
        dropped_documents=amount.dropped.documents,
        dropped=amount.dropped.tokens,
        lengths=_lengths(groups, row_length),
    )


def _empty_groups() -> pl.DataFrame:
    schema = {"source": pl.UInt16, "length": pl.UInt32, "segments": pl.Int64, "documents": pl.Int64}
    return pl.DataFrame(schema=schema)


def _grouped(block: Block) -> pl.DataFrame:
    """Segments, and documents that begin, of each source and length of a block."""
    segments = block.segments
    frame = pl.DataFrame({"source": segments.source, "length": segments.length, "is_first": block.begins_document})
    return frame.group_by("source", "length").agg(
        segments=pl.len().cast(pl.Int64), documents=pl.col("is_first").sum().cast(pl.Int64)
    )


def _added(left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([left, right]).group_by("source", "length").agg(pl.col("segments", "documents").sum())


def rows_with_repeats(block: Block) -> NDArray[np.int64]:
    """Return the rows of a block in which pieces of one document overlap, ascending.

    Pieces are sorted by where they begin, so if any two overlap, two neighbours do.
    """
    segments = block.segments
    frame = pl.DataFrame(
        {
            "row": block.row,
            "document": segments.document,
            "begin": segments.offset.astype(np.int64),
            "end": segments.offset.astype(np.int64) + segments.length,
        }
    ).sort("row", "document", "begin")
    overlaps = pl.col("begin") < pl.col("end").shift(1).over("row", "document")
    return frame.filter(overlaps)["row"].unique(maintain_order=True).to_numpy()


def _tokens(groups: pl.DataFrame) -> int:
    return int((groups["length"].cast(pl.Int64) * groups["segments"]).sum())


def _lengths(groups: pl.DataFrame, row_length: int) -> Lengths:
    frame = groups.group_by("length").agg(pl.col("segments").sum()).sort("length")
    return summarized(frame["length"].to_numpy().astype(np.int64), frame["segments"].to_numpy(), row_length)


def _slices(array: Any, step: int = 1 << 20) -> Iterator[NDArray[Any]]:
    return (array[start : start + step] for start in range(0, len(array), step))


def _split_text(name: str, split: SplitStats, length: int) -> Iterator[str]:
    yield f"{name}: {count(split.rows)} rows of {count(length)}, fill {percent(split.fill)}"
    yield f"{count(split.tokens)} tokens, {count(split.targets)} of them targets; {count(split.padding)} padding"
    yield f"{count(split.rows_with_repeats)} rows hold tokens of one document twice"
    yield ""
    header = ["source", "documents", "segments", "tokens", "share", "wanted", "epochs", "truncated", "dropped"]
    yield table(header, [_source_row(source, each) for source, each in split.sources.items()])
    yield ""
    yield "segment lengths in tokens; a bar is 1, 2-3, 4-7, .. tokens, the last holds the row length"
    lines = [(source, each.lengths) for source, each in split.sources.items()]
    lines += [("all", split.lengths)] if len(lines) > 1 else []
    header = ["source", *QUANTILES, "max", f"1 .. {count(length)}"]
    yield table(header, [_lengths_row(source, lengths) for source, lengths in lines])
    if split.trained is not None:
        yield ""
        yield from _trained_text(split.trained, length)


def _source_row(name: str, source: SourceStats) -> list[str]:
    return [
        name,
        *(count(value) for value in (source.documents, source.segments, source.tokens)),
        percent(source.share),
        "-" if source.wanted_share is None else percent(source.wanted_share),
        "-" if source.epochs is None else f"{source.epochs:.3f}",
        count(source.truncated),
        count(source.dropped),
    ]


def _lengths_row(name: str, lengths: Lengths) -> list[str]:
    quantiles = [count(getattr(lengths, quantile)) for quantile in QUANTILES]
    return [name, *quantiles, count(lengths.max), histogram(lengths.histogram)]


def _trained_text(trained: TargetStats, length: int) -> Iterator[str]:
    """What is trained on, in words and as lengths."""
    yield (
        f"{percent(trained.share)} of the tokens are targets, in {count(trained.spans)} spans; "
        f"{percent(trained.ends_turn)} of them end a turn"
    )
    lines = [("spans", trained.lengths)]
    if (pairs := trained.pairs) is not None:
        yield f"{count(pairs.pairs)} pairs, both sides of each in one row"
        lines += [("prompt", pairs.prompt), ("chosen", pairs.chosen), ("rejected", pairs.rejected)]
    yield table(["tokens", *QUANTILES, "max", f"1 .. {count(length)}"], [_lengths_row(*line) for line in lines])


def _ledger_text(stats: Stats) -> Iterator[str]:
    books = stats.ledger.sources
    yield "ledger: records = documents + empty + quarantined + left out"
    header = ["source", "files", "records", "documents", "empty", "quarantined", "left out", "control strings"]
    yield table(header, [_records_row(name, each) for name, each in books.items()])
    yield from _chats_text(books)
    yield ""
    yield "tokens of the documents = held out + never selected + selected"
    header = ["source", "tokens", "held out", "never selected", "selected"]
    yield table(header, [_tokens_row(name, each) for name, each in books.items()])
    for split in stats.splits:
        yield ""
        yield f"{split}: selected with repeats = in rows + truncated + dropped"
        header = ["source", "selected", "in rows", "truncated", "dropped"]
        yield table(header, [_amount_row(name, each, split) for name, each in books.items()])
        sums = stats.ledger.splits[split]
        yield (
            f"{count(sums.rows)} rows x {count(stats.length)} = {count(sums.in_rows)} in rows + {count(sums.padding)} "
            f"padding"
        )
    yield ""
    yield "\n".join(["these sums do not close:", *stats.ledger_mistakes]) if stats.ledger_mistakes else "all sums close"


def _chats_text(books: Mapping[str, SourceLedger]) -> Iterator[str]:
    """Turns, and why records were left out; nothing for text."""
    for name, each in books.items():
        if each.turns or each.left_out:
            reasons = ", ".join(f"{count(number)} {fault.replace('_', ' ')}" for fault, number in each.left_out.items())
            yield (
                f"{name}: {count(each.turns)} turns, {count(each.targets)} targets, {count(each.straddling)} of them "
                f"straddle the border of a turn; left out: {reasons or 'none'}"
            )


def _records_row(name: str, books: SourceLedger) -> list[str]:
    numbers = (books.files, books.records, books.documents.documents, books.empty, books.quarantined)
    return [name, *map(count, (*numbers, sum(books.left_out.values()), books.with_control_strings))]


def _tokens_row(name: str, books: SourceLedger) -> list[str]:
    amounts = (books.documents, books.held_out, books.never_selected, books.selected)
    return [name, *(count(amount.tokens) for amount in amounts)]


def _amount_row(name: str, books: SourceLedger, split: str) -> list[str]:
    amount = books.train if split == "train" else books.validation
    return [name, *map(count, (amount.selected.tokens, amount.in_rows, amount.truncated, amount.dropped.tokens))]
