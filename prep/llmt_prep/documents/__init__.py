"""Raw files to documents: find them, cut them into units, read a unit record by record."""

from collections.abc import Iterator
from pathlib import Path

from llmt_prep.documents import columns, lines
from llmt_prep.documents.faults import reading_from
from llmt_prep.documents.files import FORMATS, compression, find_files, reader_for
from llmt_prep.documents.hub import hf_files
from llmt_prep.documents.record import PREVIEW_BYTES, BadRecord, Document, End, Item, Reading, Row, Unit, shown

__all__ = [
    "FORMATS",
    "PREVIEW_BYTES",
    "BadRecord",
    "Document",
    "End",
    "Item",
    "Reading",
    "Row",
    "Unit",
    "compression",
    "find_files",
    "hf_files",
    "lines_before",
    "read",
    "reader_for",
    "reading_from",
    "shown",
    "split_into_units",
    "unit_bytes",
]


def split_into_units(path: Path, reader: str, bytes_per_unit: int) -> list[Unit]:
    """Return the units of a file, in file order; they depend on nothing but the file and the size asked for.

    Args:
        path: the file.
        reader: as in ``Reading``; ``auto`` goes by the suffix.
        bytes_per_unit: a unit has about this many bytes, or more where the format cannot be cut (compressed files
            and text files are one unit).

    Raises:
        ConfigError: the suffix says nothing and no reader is given.
        DataError: a Parquet or Arrow file is broken, or the system cannot read the file.
    """
    reader = reader_for(str(path), reader)
    with reading_from(str(path)):
        if reader == "parquet":
            return columns.parquet_units(path, bytes_per_unit)
        if reader == "arrow":
            return columns.arrow_units(path, bytes_per_unit)
        return lines.line_units(path, reader, bytes_per_unit)


def read(unit: Unit, reading: Reading) -> Iterator[Item]:
    """Yield the unit's documents and bad records in order, then exactly one ``End``.

    Memory is bounded by ``max_record_bytes`` and a few MB, never by the file.

    Raises:
        ConfigError: the text column of a Parquet or Arrow file is missing or is no string column.
        DataError: the file is damaged or cannot be read; what could be read before that has been yielded.
    """
    readers = {"parquet": columns.read_parquet, "arrow": columns.read_arrow, "text": lines.read_text}
    with reading_from(unit.path):
        yield from readers.get(unit.reader, lines.read_jsonl)(unit, reading)


def unit_bytes(unit: Unit) -> Iterator[bytes]:
    """Yield every byte of the file on which the unit's records depend, still compressed where the file is."""
    sources = {"parquet": columns.parquet_bytes, "arrow": columns.arrow_bytes}
    with reading_from(unit.path):
        yield from sources.get(unit.reader, lines.stored_bytes)(unit)


def lines_before(unit: Unit) -> int:
    """Return how many physical lines or rows of the file lie before the unit: what makes its record numbers global.

    It reads the file up to the unit. A pipeline that has read the units before adds up their ``End.lines`` instead.
    """
    if unit.start == 0:
        return 0
    if unit.reader == "parquet":
        return columns.parquet_rows_before(unit)
    if unit.reader == "arrow":
        return columns.arrow_rows_before(unit)
    return lines.count_lines_before(unit)
