"""Raw files to documents: find them, cut them into units, read a unit record by record."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llmt_prep.documents import columns, lines
from llmt_prep.documents.faults import reading_from
from llmt_prep.documents.files import FORMATS, compression, find_files, reader_for
from llmt_prep.documents.hub import hf_files
from llmt_prep.documents.listing import find_objects
from llmt_prep.documents.record import PREVIEW_BYTES, BadRecord, Document, End, Item, Reading, Row, Unit, shown
from llmt_prep.documents.stored import (
    ByteRange,
    FileStat,
    bytes_between,
    check_unchanged,
    full_name,
    object_stat,
)

__all__ = [
    "FORMATS",
    "PREVIEW_BYTES",
    "BadRecord",
    "ByteRange",
    "Document",
    "End",
    "FileStat",
    "Item",
    "Reading",
    "Row",
    "Unit",
    "check_unchanged",
    "compression",
    "find_files",
    "find_objects",
    "full_name",
    "hf_files",
    "lines_before",
    "object_stat",
    "read",
    "reader_for",
    "reading_from",
    "shown",
    "split_into_units",
    "unit_bytes",
    "unit_ranges",
]


def split_into_units(path: Path | str, reader: str, bytes_per_unit: int, copy: str = "") -> list[Unit]:
    """Return the units of a file, in file order; they depend on nothing but the file and the size asked for.

    Args:
        path: the file, or its URL.
        reader: as in ``Reading``; ``auto`` goes by the suffix.
        bytes_per_unit: a unit has about this many bytes, or more where the format cannot be cut (compressed files
            and text files are one unit).
        copy: a file that is read in its place.

    Raises:
        ConfigError: the suffix says nothing and no reader is given.
        DataError: a Parquet or Arrow file is broken, or the system cannot read the file.
    """
    whole = Unit(str(path), reader_for(str(path), reader), 0, 0, copy)
    cuts = {"parquet": columns.parquet_units, "arrow": columns.arrow_units}
    with reading_from(whole.path):
        return cuts.get(whole.reader, lines.line_units)(whole, bytes_per_unit)


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
    with reading_from(unit.path):
        for begin, end in unit_ranges(unit):
            yield from bytes_between(unit.file, begin, end)


def unit_ranges(unit: Unit) -> list[ByteRange]:
    """Return where in the file the bytes lie on which the unit's records depend."""
    with reading_from(unit.path):
        if unit.reader == "parquet":
            return list(columns.parquet_ranges(unit))
        if unit.reader == "arrow":
            return list(columns.arrow_ranges(unit))
        return [lines.stored_range(unit)]


def lines_before(unit: Unit) -> int:
    """Return how many physical lines or rows of the file lie before the unit: what makes its record numbers global.

    It reads the file up to the unit. A pipeline that has read the units before adds up their ``End.lines`` instead.
    """
    if unit.start == 0:
        return 0
    unit = replace(unit, copy="")  # which holds no more than the unit
    if unit.reader == "parquet":
        return columns.parquet_rows_before(unit)
    if unit.reader == "arrow":
        return columns.arrow_rows_before(unit)
    return lines.count_lines_before(unit)
