"""Files of columns, Parquet and Arrow: read in slices of bounded size; a bad value spoils its own row only."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from llmt_prep.documents.stored import ByteRange, opened, size_of
from llmt_shared.errors import ConfigError, DataError
from llmt_shared.objects import is_url

_SLICE_BYTES = 16 << 20
_MAX_SLICE_ROWS = 1024
_FILE_MAGIC = b"ARROW1\0\0"


def parquet_units(whole: Unit, bytes_per_unit: int) -> list[Unit]:
    """Cut into ranges of row groups of about so many stored bytes."""
    with _readable(whole.path, "Parquet"), _parquet(whole) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        sizes = [sum(end - begin for begin, end in _chunks(group)) for group in groups]
    borders = _borders(sizes, bytes_per_unit)
    return [replace(whole, start=start, stop=stop) for start, stop in itertools.pairwise(borders)]


def read_parquet(unit: Unit, reading: Reading) -> Iterator[Item]:
    """Yield a row group range's records."""
    with _readable(unit.path, "Parquet"), _parquet(unit, pre_buffer=False) as file:
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


def parquet_ranges(unit: Unit) -> Iterator[ByteRange]:
    """Yield where the row groups lie, and the file's metadata, which says how to read them."""
    with _readable(unit.path, "Parquet"), _parquet(unit) as file:
        groups = [file.metadata.row_group(i) for i in range(unit.start, unit.stop)]
        footer = file.metadata.serialized_size
    size = size_of(unit.file)
    for group in groups:
        yield from _chunks(group)
    yield max(size - footer - 8, 0), size


def parquet_rows_before(unit: Unit) -> int:
    """Count the rows of earlier row groups."""
    with _readable(unit.path, "Parquet"), _parquet(unit) as file:
        return sum(file.metadata.row_group(i).num_rows for i in range(unit.start))


class _Message(NamedTuple):
    start: int
    stop: int
    content: Any


def arrow_units(whole: Unit, bytes_per_unit: int) -> list[Unit]:
    """Cut into byte ranges of whole record batches; a file with dictionaries, or without batches, is one unit."""
    with _readable(whole.path, "Arrow"):
        _, *messages = _messages(whole)
    if not messages or any(message.content.type != "record batch" for message in messages):
        return [replace(whole, start=0, stop=size_of(whole.file))]
    borders = _borders([message.stop - message.start for message in messages], bytes_per_unit)
    offsets = [message.start for message in messages] + [messages[-1].stop]
    ranges = itertools.pairwise(borders)
    return [replace(whole, start=offsets[first], stop=offsets[last]) for first, last in ranges]


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


def arrow_ranges(unit: Unit) -> Iterator[ByteRange]:
    """Yield where the schema lies, which says how to read the rest, and the record batches."""
    if unit.start:
        with _readable(unit.path, "Arrow"):
            schema = next(_messages(unit))
        yield schema.start, schema.stop
    yield unit.start, unit.stop


def arrow_rows_before(unit: Unit) -> int:
    """Count the rows of earlier record batches."""
    with _readable(unit.path, "Arrow"):
        schema, *messages = _messages(unit)
        batches = [ipc.read_record_batch(each.content, ipc.read_schema(schema.content)) for each in messages
                   if each.stop <= unit.start]  # fmt: skip
    return sum(batch.num_rows for batch in batches)


def _batches(unit: Unit) -> Iterator[Any]:
    if unit.start == 0:
        with _arrow(unit) as source:
            if _is_ipc_file(unit):
                reader = ipc.open_file(source)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from ipc.open_stream(source)
        return
    schema = ipc.read_schema(next(_messages(unit)).content)
    for message in _messages_between(unit, unit.start, unit.stop):
        yield ipc.read_record_batch(message.content, schema)


def _messages(unit: Unit) -> Iterator[_Message]:
    """The schema message, then all others of the file: an IPC file is a stream too, behind its magic bytes.

    Source: Apache Arrow columnar format, "Serialization and Interprocess Communication (IPC)".
    """
    yield from _messages_between(unit, len(_FILE_MAGIC) if _is_ipc_file(unit) else 0, None)


def _messages_between(unit: Unit, start: int, stop: int | None) -> Iterator[_Message]:
    """The messages of a byte range, or of all that follows ``start`` and must then have an end mark."""
    with _arrow(unit) as source:
        source.seek(start)
        reader, end = ipc.MessageReader.open_stream(source), start
        while (stop is None or end < stop) and (content := _next_message(reader)) is not None:
            yield _Message(end, source.tell(), content)
            end = source.tell()
        is_whole = end == stop if stop is not None else end > start and source.tell() > end
        if not is_whole:  # a writer that was killed leaves whole messages and nothing behind
            raise EOFError("it has no schema" if end == start else "it has no end mark")


def _next_message(reader: Any) -> Any:
    try:
        return reader.read_next_message()
    except StopIteration:
        return None


def _is_ipc_file(unit: Unit) -> bool:
    with opened(unit.file) as file:
        return file.read(len(_FILE_MAGIC)) == _FILE_MAGIC


def _parquet(unit: Unit, **options: Any) -> Any:
    return pq.ParquetFile(opened(unit.file) if is_url(unit.file) else unit.file, **options)


def _arrow(unit: Unit) -> Any:
    return pa.PythonFile(opened(unit.file), "r") if is_url(unit.file) else pa.memory_map(unit.file)


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
