"""Files of columns, Parquet and Arrow: read in slices of bounded size; a bad value spoils its own row only."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ipc

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
from llmt_shared.errors import ConfigError, DataError

_SLICE_BYTES = 16 << 20
_MAX_SLICE_ROWS = 1024
_PIECE = 1 << 20
_FILE_MAGIC = b"ARROW1\0\0"


def parquet_units(path: Path, bytes_per_unit: int) -> list[Unit]:
    """Cut into ranges of row groups of about so many stored bytes."""
    with _readable(str(path), "Parquet"), pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        sizes = [sum(end - begin for begin, end in _chunks(group)) for group in groups]
    borders = _borders(sizes, bytes_per_unit)
    return [Unit(str(path), "parquet", start, stop) for start, stop in itertools.pairwise(borders)]


def read_parquet(unit: Unit, reading: Reading) -> Iterator[Item]:
    """Yield a row group range's records."""
    with _readable(unit.path, "Parquet"), pq.ParquetFile(unit.path, pre_buffer=False) as file:
        columns = _wanted_columns(unit.path, file.schema_arrow, reading)
        groups = range(unit.start, unit.stop)
        rows = sum(file.metadata.row_group(i).num_rows for i in groups)
        size = sum(file.metadata.row_group(i).total_byte_size for i in groups)
        batches = file.iter_batches(
            batch_size=_rows_per_slice(size, rows), row_groups=list(groups), columns=columns,
            use_threads=False,
        )  # fmt: skip
        first = 0
        for batch in batches if rows else ():
            yield from _records_of(batch, first, reading)
            first += batch.num_rows
    yield End(rows)


def parquet_bytes(unit: Unit) -> Iterator[bytes]:
    """Yield the stored bytes of the row groups, and of the file's metadata, which says how to read them."""
    with _readable(unit.path, "Parquet"), pq.ParquetFile(unit.path) as file:
        groups = [file.metadata.row_group(i) for i in range(unit.start, unit.stop)]
        footer = file.metadata.serialized_size
    size = Path(unit.path).stat().st_size
    for group in groups:
        for begin, end in _chunks(group):
            yield from _file_bytes(unit.path, begin, end)
    yield from _file_bytes(unit.path, max(size - footer - 8, 0), size)


def parquet_rows_before(unit: Unit) -> int:
    """Count the rows of earlier row groups."""
    with _readable(unit.path, "Parquet"), pq.ParquetFile(unit.path) as file:
        return sum(file.metadata.row_group(i).num_rows for i in range(unit.start))


class _Message(NamedTuple):
    start: int
    stop: int
    content: Any


def arrow_units(path: Path, bytes_per_unit: int) -> list[Unit]:
    """Cut into byte ranges of whole record batches; a file with dictionaries, or without batches, is one unit."""
    with _readable(str(path), "Arrow"):
        _, *messages = _messages(str(path))
    if not messages or any(message.content.type != "record batch" for message in messages):
        return [Unit(str(path), "arrow", 0, path.stat().st_size)]
    borders = _borders([message.stop - message.start for message in messages], bytes_per_unit)
    offsets = [message.start for message in messages] + [messages[-1].stop]
    ranges = itertools.pairwise(borders)
    return [Unit(str(path), "arrow", offsets[first], offsets[last]) for first, last in ranges]


def read_arrow(unit: Unit, reading: Reading) -> Iterator[Item]:
    """Yield the records of an IPC stream or file, which is mapped, not read into memory."""
    first = 0
    with _readable(unit.path, "Arrow"):
        for batch in _batches(unit):
            chosen = batch.select(_wanted_columns(unit.path, batch.schema, reading))
            for column in chosen.columns:
                _check_layout(column)
            rows = _rows_per_slice(chosen.nbytes, len(chosen))
            for start in range(0, len(chosen), rows):
                yield from _records_of(chosen.slice(start, rows), first + start, reading)
            first += len(chosen)
    yield End(first)


def arrow_bytes(unit: Unit) -> Iterator[bytes]:
    """Yield the bytes of the record batches, and of the schema, which says how to read them."""
    if unit.start:
        with _readable(unit.path, "Arrow"):
            schema = next(_messages(unit.path))
        yield from _file_bytes(unit.path, schema.start, schema.stop)
    yield from _file_bytes(unit.path, unit.start, unit.stop)


def arrow_rows_before(unit: Unit) -> int:
    """Count the rows of earlier record batches."""
    with _readable(unit.path, "Arrow"):
        schema, *messages = _messages(unit.path)
        batches = [ipc.read_record_batch(each.content, ipc.read_schema(schema.content)) for each in messages
                   if each.stop <= unit.start]  # fmt: skip
    return sum(batch.num_rows for batch in batches)


def _batches(unit: Unit) -> Iterator[Any]:
    if unit.start == 0:
        with pa.memory_map(unit.path) as source:
            if _is_ipc_file(unit.path):
                reader = ipc.open_file(source)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from ipc.open_stream(source)
        return
    messages = _messages(unit.path)
    schema = ipc.read_schema(next(messages).content)
    for message in messages:
        if unit.start <= message.start < unit.stop:
            yield ipc.read_record_batch(message.content, schema)


def _messages(path: str) -> Iterator[_Message]:
    """The schema message, then all others: an IPC file is a stream too, behind its magic bytes.

    Source: Apache Arrow columnar format, "Serialization and Interprocess Communication (IPC)".
    """
    with pa.memory_map(path) as source:
        source.seek(len(_FILE_MAGIC) if _is_ipc_file(path) else 0)
        reader = ipc.MessageReader.open_stream(source)
        start = end = source.tell()
        while (content := _next_message(reader)) is not None:
            yield _Message(end, source.tell(), content)
            end = source.tell()
        if end == start or source.tell() == end:  # a writer that was killed leaves whole messages and nothing behind
            raise EOFError("it has no schema" if end == start else "it has no end mark")


def _next_message(reader: Any) -> Any:
    try:
        return reader.read_next_message()
    except StopIteration:
        return None


def _is_ipc_file(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_FILE_MAGIC)) == _FILE_MAGIC


def _records_of(batch: Any, first: int, reading: Reading) -> Iterator[Document | Row | BadRecord]:
    if reading.text_field is not None:
        yield from _records(batch.column(0), first, reading)
        return
    for place in range(len(batch)):
        yield _row(first + place, batch.slice(place, 1), reading)


def _row(record: int, one: Any, reading: Reading) -> Row | BadRecord:
    """A row of a table as JSON would have it: what is null is left out, for tables fill what records lack with it."""
    try:
        (value,) = one.to_pylist()
    except UnicodeDecodeError as error:
        return BadRecord(record, f"invalid UTF-8 at byte {error.start} of a column ({error.reason})", "")
    except (ValueError, OverflowError, LookupError, pa.ArrowException) as error:  # dates that Python has no place for
        return BadRecord(record, f"a column cannot be read: {_first_line(error)}", "")
    value = _without_nulls(value)
    if one.nbytes > reading.max_record_bytes and (size := _size(value)) > reading.max_record_bytes:
        return BadRecord(record, too_large(size, reading), shown(str(value)[:PREVIEW_BYTES]))
    return Row(record, value)


def _size(value: Any) -> int:
    """Bytes of a row as JSON, about; a slice of a table counts dictionaries that it shares with all rows."""
    return len(orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _records(column: Any, first: int, reading: Reading) -> Iterator[Document | BadRecord]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = column  # one of them is broken: convert one at a time
    for record, value in enumerate(values, first):
        yield _record(record, value, reading)


def _check_layout(column: Any) -> None:
    """Raise ArrowInvalid where offsets or indices lead outside the data, which pyarrow follows and the process dies.

    Strings are checked as bytes: whether they are UTF-8 is for each row to say.
    """
    if pa.types.is_nested(column.type):
        _check_nested_layout(column)
        return
    if pa.types.is_dictionary(column.type):
        pa.DictionaryArray.from_arrays(column.indices, pa.nulls(len(column.dictionary)), safe=True)
        column = column.dictionary
    kind = _BINARY.get(column.type, column.type)
    pa.Array.from_buffers(kind, len(column), column.buffers(), offset=column.offset).validate(full=True)


def _check_nested_layout(column: Any) -> None:
    """The offsets first: only then may one look at what they lead to."""
    column.validate()
    if pa.types.is_struct(column.type):
        children = [column.field(i) for i in range(column.type.num_fields)]
    elif pa.types.is_union(column.type):
        column.validate(full=True)
        return
    else:
        children = [column.values]
    for child in children:
        _check_layout(child)


_BINARY = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def _record(record: int, value: Any, reading: Reading) -> Document | BadRecord:
    try:
        text = value.as_py() if isinstance(value, pa.Scalar) else value
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 at byte {error.start} of the text ({error.reason})"
        return BadRecord(record, reason, shown(error.object))
    if text is None:
        return BadRecord(record, f"column {reading.text_field!r} is null; wanted a string", "")
    if 4 * len(text) > reading.max_record_bytes and (size := len(text.encode())) > reading.max_record_bytes:
        return BadRecord(record, too_large(size, reading), shown(text))
    return Document(record, text)


def _wanted_columns(path: str, schema: Any, reading: Reading) -> list[str]:
    if reading.text_field is None:
        return list(schema.names)
    _check_column(path, schema, reading.text_field)
    return [reading.text_field]


def _check_column(path: str, schema: Any, field: str) -> None:
    index = schema.get_field_index(field)
    if index < 0:
        columns = ", ".join(f"{each.name} ({each.type})" for each in schema) or "none"
        raise ConfigError(f"{path}: no column {field!r}; it has {columns}; set `text_field:`")
    kind = schema.field(index).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise ConfigError(f"{path}: column {field!r} is of type {kind}; wanted string, large_string or string_view")


def _rows_per_slice(size: int, rows: int) -> int:
    return max(1, min(_MAX_SLICE_ROWS, _SLICE_BYTES * max(rows, 1) // max(size, 1)))


def _chunks(group: Any) -> list[tuple[int, int]]:
    """Byte ranges of a row group's column chunks, in file order."""
    columns = [group.column(i) for i in range(group.num_columns)]
    starts = [each.dictionary_page_offset or each.data_page_offset for each in columns]
    return sorted((start, start + each.total_compressed_size) for start, each in zip(starts, columns, strict=True))


def _borders(sizes: list[int], wanted: int) -> list[int]:
    """Borders of runs of sizes: a run ends as soon as it has the wanted sum; no sizes make one empty run."""
    borders, total = [0], 0
    for index, size in enumerate(sizes, start=1):
        total += size
        if total >= wanted:
            borders.append(index)
            total = 0
    return borders if len(borders) > 1 and borders[-1] == len(sizes) else [*borders, len(sizes)]


def _file_bytes(path: str, begin: int, end: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(begin)
        while begin < end and (piece := file.read(min(_PIECE, end - begin))):
            begin += len(piece)
            yield piece


@contextmanager
def _readable(path: str, kind: str) -> Iterator[None]:
    """Turn what pyarrow says of a damaged file into one message; a missing file stays what it is."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError, SystemError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system cannot read it
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise DataError(
            f"{path}: not a readable {kind} file: {reason}; it is damaged, cut short or of another format: "
            f"fetch it again, or set `reader:` to what it is"
        ) from None
