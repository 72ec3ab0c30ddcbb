"""Files made of lines: JSON lines and plain text, stored plainly or compressed.

Bytes come in pieces of about 1 MiB, whatever the file; only one record is ever held.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO, NamedTuple

import orjson
import zstandard

from llmt_prep.documents.files import compression
from llmt_prep.documents.record import (
    PREVIEW_BYTES,
    BadRecord,
    Document,
    End,
    Item,
    Reading,
    Row,
    Unit,
    shown,
    too_large,
)
from llmt_prep.documents.stored import ByteRange, bytes_between, opened, size_of
from llmt_shared.errors import DataError

_PIECE = 1 << 20
_ZSTD_PIECE = 1 << 10
"""Compressed bytes given to zstd at once; it has no limit on its output, and 1 KiB can become 32 MiB at most."""
_BOM = b"\xef\xbb\xbf"
_KEY_CHARACTERS = 60
"""Of a field's name in a message; a name may be as long as a record."""


class _Line(NamedTuple):
    data: bytes
    """Without its line feed; only the start of it where it is longer than the limit."""
    size: int


def line_units(whole: Unit, bytes_per_unit: int) -> list[Unit]:
    """Cut plain JSON lines into byte ranges; anything else, and an empty file, is one unit."""
    size = size_of(whole.file)
    if whole.reader == "text" or compression(whole.path) or size == 0:
        return [replace(whole, start=0, stop=size)]
    starts = range(0, size, bytes_per_unit)
    return [replace(whole, start=start, stop=min(start + bytes_per_unit, size)) for start in starts]


def stored_range(unit: Unit) -> ByteRange:
    """Where the unit's bytes lie in the file: of plain JSON lines, those of the lines that start in it."""
    if unit.reader != "jsonl" or compression(unit.path):
        return unit.start, unit.stop
    with opened(unit.file) as file:
        return _line_start(file, unit.start), _line_start(file, unit.stop)


def count_lines_before(unit: Unit) -> int:
    """Count the lines that start before the unit."""
    before = replace(unit, start=0, stop=unit.start)
    return sum(1 for _ in _lines(_contents(before), limit=0))


def read_jsonl(unit: Unit, reading: Reading) -> Iterator[Item]:
    """Yield the records of JSON lines; blank lines are no records but count as lines."""
    number = -1
    for number, line in enumerate(_lines(_contents(unit), reading.max_record_bytes)):
        if line.size > reading.max_record_bytes:
            yield BadRecord(number, too_large(line.size, reading), shown(line.data))
        elif line.data.strip():
            yield _parsed(number, line.data, reading.text_field)
    yield End(number + 1)


def read_text(unit: Unit, reading: Reading) -> Iterator[Item]:
    """Yield the records of a text file: the whole file, its lines that are not blank, or its paragraphs."""
    if reading.record == "file":
        return _read_file(unit, reading)
    lines = _lines(_contents(unit), reading.max_record_bytes)
    return _read_lines(lines, reading) if reading.record == "line" else _read_paragraphs(lines, reading)


def _read_file(unit: Unit, reading: Reading) -> Iterator[Item]:
    kept: list[bytes] = []
    size = 0
    for piece in _contents(unit):
        size += len(piece)
        if size <= reading.max_record_bytes:
            kept.append(piece)
        else:
            kept = kept[:1] or [piece[:PREVIEW_BYTES]]  # too large already: nothing but its start is of use
    yield _decoded(0, b"".join(kept), size, reading)
    yield End(1)


def _read_lines(lines: Iterator[_Line], reading: Reading) -> Iterator[Item]:
    number = -1
    for number, line in enumerate(lines):
        if not _is_blank(line):
            yield _decoded(number, line.data.removesuffix(b"\r"), line.size, reading)
    yield End(number + 1)


def _read_paragraphs(lines: Iterator[_Line], reading: Reading) -> Iterator[Item]:
    number, first, size = -1, 0, 0
    kept: list[bytes] = []
    for number, line in enumerate(lines):
        if _is_blank(line):
            if kept:
                yield _decoded(first, b"\n".join(kept), size, reading)
            kept, size = [], 0
            continue
        first = first if kept else number
        size += line.size + bool(kept)
        if size <= reading.max_record_bytes or not kept:
            kept.append(line.data.removesuffix(b"\r"))
    if kept:
        yield _decoded(first, b"\n".join(kept), size, reading)
    yield End(number + 1)


def _is_blank(line: _Line) -> bool:
    return len(line.data) == line.size and not line.data.strip()


def _decoded(record: int, data: bytes, size: int, reading: Reading) -> Document | BadRecord:
    if size > reading.max_record_bytes:
        return BadRecord(record, too_large(size, reading), shown(data))
    try:
        return Document(record, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(record, _not_utf8(error), shown(data))


def _parsed(record: int, line: bytes, field: str | None) -> Document | Row | BadRecord:
    try:
        value = orjson.loads(line)
        return Document(record, _text_of(value, field)) if field is not None else Row(record, _object(value))
    except orjson.JSONDecodeError as error:  # itself a ValueError
        return BadRecord(record, _why_not_json(line, error), shown(line))
    except ValueError as error:
        return BadRecord(record, str(error), shown(line))


def _text_of(value: object, field: str) -> str:
    """The text of a parsed record; a ValueError says why it has none."""
    if not isinstance(value, dict):
        raise ValueError(f"{_JSON_KINDS[type(value)]}; wanted an object with the field {field!r}")
    if field not in value:
        present = ", ".join(repr(key[:_KEY_CHARACTERS]) for key in list(value)[:12]) or "none"
        raise ValueError(f"no field {field!r}; its fields: {present}; `text_field` names the one to read")
    text = value[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is {_JSON_KINDS[type(text)]}; wanted a string")
    return text


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{_JSON_KINDS[type(value)]}; wanted an object, such as {{"messages": [..]}}')
    return value


_JSON_KINDS = {
    str: "a string", int: "a number", float: "a number", bool: "a boolean", list: "a list", dict: "an object",
    type(None): "null",
}  # fmt: skip


def _why_not_json(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as not_utf8:
        return _not_utf8(not_utf8)
    if line.startswith(_BOM):
        return (
            "byte order mark (BOM) inside the file, at the start of this line; wanted one at the file's start or none"
        )
    if "surrogate" in error.msg:
        return f"lone surrogate at column {error.colno}, which is no character ({error.msg})"
    return f"not valid JSON: {error.msg} at column {error.colno}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8 at byte {error.start} of the record ({error.reason})"


def _lines(pieces: Iterator[bytes], limit: int) -> Iterator[_Line]:
    """Yield the lines of the pieces' concatenation; a last line needs no line feed. Sizes are in bytes."""
    kept: list[bytes] = []
    size = 0
    for piece in pieces:
        *ends, rest = piece.split(b"\n")
        for end in ends:
            size += len(end)
            yield _Line(b"".join([*kept, end]) if size <= limit else b"".join([*kept, end])[:PREVIEW_BYTES], size)
            kept, size = [], 0
        size += len(rest)
        if size <= limit:
            kept.append(rest)
        else:
            kept = [b"".join([*kept, rest])[:PREVIEW_BYTES]]  # too long already: nothing but its start is of use
    if size:
        yield _Line(b"".join(kept), size)


def _contents(unit: Unit) -> Iterator[bytes]:
    """Decompressed pieces, without the byte order mark that may start a file."""
    pieces = _decompressed(unit)
    if unit.start == 0:
        head = b""
        while len(head) < len(_BOM) and (piece := next(pieces, None)) is not None:
            head += piece
        yield head.removeprefix(_BOM)
    yield from pieces


def _decompressed(unit: Unit) -> Iterator[bytes]:
    kind = compression(unit.path)
    if not kind:
        yield from bytes_between(unit.file, *stored_range(unit))
        return
    name = {".gz": "gzip", ".zst": "Zstandard"}[kind]
    try:
        with opened(unit.file) as file:
            yield from _gunzip(file) if kind == ".gz" else _unzstd(file)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        if "too much memory" in str(error):
            raise DataError(
                f"{unit.path}: written by `zstd --long`, so reading takes more than 128 MiB of memory; "
                f"compress it again without `--long`"
            ) from None
        raise DataError(
            f"{unit.path}: not a whole {name} file: {error}; it is damaged or was cut short: fetch or compress it again"
        ) from None


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    """Members one after another, as `gzip -d` reads them; zeros between or after them are padding."""
    member = None
    while piece := file.read(_PIECE):
        while piece or member is not None:
            if member is None:
                piece = piece.lstrip(b"\0")
                if not piece:
                    break
                member = zlib.decompressobj(wbits=31)
            out = member.decompress(piece, _PIECE)
            yield out
            piece = member.unconsumed_tail
            if member.eof:
                piece, member = member.unused_data, None
            elif not piece and len(out) < _PIECE:
                break  # a full output may hide more; a shorter one wants more input
    if member is not None:
        raise EOFError("it ends inside a compressed member")


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """Frames one after another, as `zstd -d` reads them; each must end before the file does."""
    frame = None
    while piece := file.read(_ZSTD_PIECE):
        while piece:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            out = frame.decompress(piece)
            for start in range(0, len(out), _PIECE):  # cut: 32 MiB of line feeds would be 32 million lines at once
                yield out[start : start + _PIECE]
            piece = b""
            if frame.eof:
                piece, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it ends inside a compressed frame")


def _line_start(file: BinaryIO, offset: int) -> int:
    """The first start of a line at or after a byte; the file's size where no further line starts."""
    if offset == 0:
        return 0
    position = offset - 1  # a line feed just before the offset makes the offset a start
    file.seek(position)
    while piece := file.read(1 << 16):
        found = piece.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(piece)
    return file.seek(0, os.SEEK_END)
