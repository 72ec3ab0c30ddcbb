"""What reading gives: documents, bad records with their reasons, and where they lie."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

PREVIEW_BYTES = 160
"""How much of a bad record is kept to recognise it by."""


@dataclass(frozen=True)
class Reading:
    """How the files of a source become documents."""

    reader: Literal["auto", "jsonl", "parquet", "arrow", "text"] = "auto"
    """`auto` goes by the file's suffix."""
    text_field: str | None = "text"
    """JSON key or column that holds the text; text files have none. ``None``: records are given whole, for chats."""
    record: Literal["file", "line", "paragraph"] = "file"
    """What one document of a text file is; a paragraph ends at a blank line."""
    max_record_bytes: int = 64 * 2**20
    """A larger record, decompressed, is bad; it is skipped without being held in memory."""


@dataclass(frozen=True)
class Unit:
    """A part of one file that is read, hashed and tokenized as a whole."""

    path: str
    reader: str
    """`jsonl`, `parquet`, `arrow` or `text`."""
    start: int
    stop: int
    """Half-open range: row groups of a Parquet file, else bytes. Of plain JSON lines the unit owns those that START in
    it; of an Arrow file it has whole record batches, and `start` 0 means the whole file."""
    copy: str = ""
    """File that stands in for the one at ``path`` while this unit is read: what of it the unit depends on is there."""

    @property
    def file(self) -> str:
        """Where its bytes are read; ``path`` is what it is called."""
        return self.copy or self.path


class Document(NamedTuple):
    """One text to train on."""

    record: int
    """Physical line or row, from 0 at the unit's start; blank lines count. A paragraph has that of its first line."""
    text: str


class Row(NamedTuple):
    """One record as it is, where `Reading.text_field` is ``None``."""

    record: int
    """As in `Document`."""
    value: dict[str, Any]
    """JSON values; of a table, all columns."""


class BadRecord(NamedTuple):
    """A record that cannot be a document."""

    record: int
    reason: str
    preview: str
    """The start of the record; data, to be escaped where it is shown."""


class End(NamedTuple):
    """The last thing read from a unit."""

    lines: int
    """Physical lines or rows in the unit; 1 where a whole text file is one record."""


Item = Document | Row | BadRecord | End


def shown(data: bytes | str) -> str:
    """Return the start of a record as text, whatever its bytes are."""
    raw = data[:PREVIEW_BYTES].encode("utf-8", "replace") if isinstance(data, str) else data
    return raw[:PREVIEW_BYTES].decode("utf-8", "replace")


def too_large(size: int, reading: Reading) -> str:
    """Return the reason that quarantines a record of ``size`` bytes."""
    return f"record of {size} bytes, more than max_record_bytes = {reading.max_record_bytes}"
