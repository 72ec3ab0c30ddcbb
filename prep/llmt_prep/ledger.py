"""The ledger: where every record and token went, per source, and the sums that must close.

    records                  = documents + empty + quarantined + left out
    documents                = held_out + never_selected + selected                  (and so their tokens)
    selected_with_repeats    = in_rows + truncated + dropped                         (tokens, training)
    held_out                 = in_rows + truncated + dropped                         (tokens, validation)
    rows x L                 = in_rows + padding                                     (each split)

`in_rows` is counted from the finished arrays, the rest from the token store and from what was handed to the packer,
so that a lost or repeated token anywhere breaks a sum.
"""

from collections.abc import Mapping, Sequence

from pydantic import Field

from llmt_prep.config import MixConfig
from llmt_prep.corpus import Corpus
from llmt_prep.selection import Selected
from llmt_prep.store import COUNTED, LEFT_OUT
from llmt_prep.tally import Tally
from llmt_shared.config import StrictModel


class Amount(StrictModel):
    """Documents and their tokens."""

    documents: int
    tokens: int


class SplitAmount(StrictModel):
    """What became of a source's documents in one split."""

    selected: Amount
    """Each document as often as it was selected."""
    in_rows: int
    """Tokens."""
    truncated: int
    """Tokens cut from documents that are in rows."""
    dropped: Amount
    """Documents longer than a row, under `overflow: drop`."""


class SourceLedger(StrictModel):
    """One source's books."""

    files: int
    records: int
    documents: Amount
    empty: int
    quarantined: int
    left_out: dict[str, int] = Field(default_factory=dict)
    """Chats and pairs that are well-formed and yet nothing to train on, by what is wrong with them."""
    with_control_strings: int
    """Documents whose text holds the string of a control token."""
    turns: int = 0
    """Messages of the chats, or of both sides of the pairs; 0 for text."""
    targets: int = 0
    """Tokens of the documents that are targets, of chats and pairs; 0 for text, where all but the first are."""
    straddling: int = 0
    """Of the targets, those that begin before their turn or end behind it."""
    held_out: Amount
    never_selected: Amount
    selected: Amount
    """Selected for training at least once, each counted once."""
    wanted: int
    """Tokens that the mix asks of this source."""
    epochs: float
    """Tokens selected with repeats / tokens that could be selected."""
    train: SplitAmount
    validation: SplitAmount


class SplitLedger(StrictModel):
    """The rows of one split."""

    rows: int
    in_rows: int
    padding: int


class Ledger(StrictModel):
    """The whole of ledger.json."""

    sources: dict[str, SourceLedger]
    splits: dict[str, SplitLedger]


def mistakes(ledger: Ledger, length: int) -> list[str]:
    """Sums that do not close, one line each; none when the books are right.

    Args:
        ledger: the books.
        length: tokens of a row.
    """
    found: list[str] = []

    def check(what: str, whole: int, *parts: int) -> None:
        if whole != sum(parts):
            found.append(f"{what}: {whole} != {' + '.join(map(str, parts))}")

    for name, books in ledger.sources.items():
        documents = books.documents.documents
        check(f"{name}: records", books.records, documents, books.empty, books.quarantined, *books.left_out.values())
        shares = (books.held_out, books.never_selected, books.selected)
        check(f"{name}: documents", books.documents.documents, *(share.documents for share in shares))
        check(f"{name}: tokens", books.documents.tokens, *(share.tokens for share in shares))
        for split, amount in (("train", books.train), ("validation", books.validation)):
            gone = (amount.in_rows, amount.truncated, amount.dropped.tokens)
            check(f"{name}: {split} tokens", amount.selected.tokens, *gone)
        check(f"{name}: held out", books.held_out.tokens, books.validation.selected.tokens)
    for split, sums in ledger.splits.items():
        check(f"{split}: rows x {length}", sums.rows * length, sums.in_rows, sums.padding)
        per_source = [getattr(books, split).in_rows for books in ledger.sources.values()]
        check(f"{split}: tokens in rows", sums.in_rows, *per_source)
    return found


def source_ledgers(
    config: MixConfig,
    corpus: Corpus,
    selected: Selected,
    files: Mapping[int, int],
    tallies: Mapping[str, Sequence[Tally]],
    in_rows: Mapping[str, Sequence[int]],
) -> dict[str, SourceLedger]:
    """Return the books of every source, by name.

    Args:
        config: the mix.
        corpus: everything tokenized.
        selected: the plan of contents.
        files: number of input files by source.
        tallies: by split, what was handed to the packer from each source.
        in_rows: by split, tokens of each source counted in the finished arrays.
    """
    counts = [dict(zip(COUNTED, of_source, strict=True)) for of_source in corpus.counts.tolist()]
    books = {}
    for source, name in enumerate(config.sources):
        found = selected.surveys[source]
        amounts = {split: _split_amount(tallies[split][source], in_rows[split][source]) for split in tallies}
        held_out = Amount(documents=found.held_out_documents, tokens=found.held_out_tokens)
        once = tallies["train"][source]
        selection = selected.mixture.selections[source]
        books[name] = SourceLedger(
            files=files[source],
            records=counts[source]["records"],
            documents=Amount(documents=found.documents, tokens=found.tokens),
            empty=counts[source]["empty"],
            quarantined=counts[source]["quarantined"],
            left_out={fault: counts[source][fault] for fault in LEFT_OUT if counts[source][fault]},
            with_control_strings=counts[source]["documents_with_control_strings"],
            turns=counts[source]["turns"],
            targets=counts[source]["target_tokens"],
            straddling=counts[source]["straddling"],
            held_out=held_out,
            never_selected=Amount(
                documents=counts[source]["documents"] - held_out.documents - once.distinct_documents,
                tokens=counts[source]["tokens"] - held_out.tokens - once.distinct_tokens,
            ),
            selected=Amount(documents=once.distinct_documents, tokens=once.distinct_tokens),
            wanted=selection.wanted,
            epochs=selection.epochs,
            train=amounts["train"],
            validation=amounts.get("validation", _NOTHING),
        )
    return books


_NOTHING = SplitAmount(
    selected=Amount(documents=0, tokens=0), in_rows=0, truncated=0, dropped=Amount(documents=0, tokens=0)
)


def _split_amount(tally: Tally, in_rows: int) -> SplitAmount:
    return SplitAmount(
        selected=Amount(documents=tally.documents, tokens=tally.tokens),
        in_rows=in_rows,
        truncated=tally.truncated,
        dropped=Amount(documents=tally.dropped_documents, tokens=tally.dropped),
    )
