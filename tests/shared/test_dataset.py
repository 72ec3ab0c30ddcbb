"""Our reader against zarr's own, and what opening a dataset notices."""

import hashlib
import json
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep import arrays
from llmt_shared.chunks import ArrayFolder, ChunkedArray, DiskChunks
from llmt_shared.dataset import Split, open_dataset
from llmt_shared.errors import FormatError
from llmt_shared.manifest import FileEntry, Manifest
from llmt_shared.segments import IGNORE

ROWS = [[3, 2], [5], [1, 1, 1], []]
LENGTH = 6
PER_SHARD = 3


def open_array(path: Path) -> ChunkedArray:
    return ChunkedArray(path, DiskChunks())


def write_tokens(path: Path, tokens: np.ndarray, per_shard: int) -> None:
    arrays.write_metadata(path, tokens.shape, (per_shard, tokens.shape[1]), tokens.dtype)
    for chunk, start in enumerate(range(0, len(tokens), per_shard)):
        part = tokens[start : start + per_shard]
        whole = np.zeros((per_shard, tokens.shape[1]), tokens.dtype)
        whole[: len(part)] = part
        arrays.write_chunk(path / "c" / str(chunk) / "0", whole)


def write_dataset(path: Path, dtype: str = "uint16") -> Path:
    """Four rows in two shards: tokens count up from 1, padding is 0; the last row holds nothing."""
    lengths = [n for row in ROWS for n in row]
    tokens = np.zeros((len(ROWS), LENGTH), dtype)
    for row, sizes in zip(tokens, ROWS, strict=True):
        row[: sum(sizes)] = np.arange(1, sum(sizes) + 1)
    train = path / "train"
    arrays.write_group(path, {})
    arrays.write_group(train, {})
    write_tokens(train / "tokens", tokens, PER_SHARD)
    columns = {
        "row_offsets": np.cumsum([0, *map(len, ROWS)]), "row_targets": [sum(n - 1 for n in row) for row in ROWS],
        "segment_length": lengths, "segment_offset": [0] * len(lengths),
        "segment_document": np.arange(len(lengths)) + 2**40, "segment_source": [0] * len(lengths),
    }  # fmt: skip
    dtypes = {"row_offsets": "int64", "segment_document": "uint64", "segment_source": "uint16"}
    for name, values in columns.items():
        column = np.array(values, dtypes.get(name, "uint32"))
        arrays.write_column(train / name, [column], len(column), column.dtype.name)
    seal(path)
    return path


def seal(path: Path) -> None:
    files = sorted(each for each in path.rglob("*") if each.is_file() and each.name != "MANIFEST.json")
    entries = [
        FileEntry(
            path=each.relative_to(path).as_posix(), bytes=each.stat().st_size,
            sha256=hashlib.sha256(each.read_bytes()).hexdigest(),
        ) for each in files
    ]  # fmt: skip
    segments, tokens = sum(map(len, ROWS)), sum(map(sum, ROWS))
    manifest = Manifest.model_validate({
        "format": 1, "kind": "pretrain", "length": LENGTH, "sources": ("web",), "recipe": "none",
        "tokenizer": {"digest": "", "vocab_size": 9, "max_id": 8, "bos_id": None, "eos_id": None, "pad_id": None},
        "splits": {"train": {"rows": 4, "segments": segments, "tokens": tokens, "targets": tokens - segments}},
        "files": tuple(entries),
    })  # fmt: skip
    (path / "MANIFEST.json").write_text(manifest.model_dump_json())


@pytest.fixture
def dataset_path(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_zarr_reads_the_same_tokens(tmp_path, dtype):
    path = write_dataset(tmp_path / "data", dtype)
    plain = zarr.open_group(path, mode="r")["train/tokens"][:]
    ours = open_dataset(path).train
    assert plain.dtype == dtype
    assert ours.token_dtype == dtype
    assert np.array_equal(ours.tokens(range(4)), plain)


def test_zarr_reads_the_same_columns(dataset_path):
    train = zarr.open_group(dataset_path, mode="r")["train"]
    table = open_dataset(dataset_path).train.segments(range(4))
    assert np.array_equal(np.cumsum([0, *table.per_row]), train["row_offsets"][:])
    for name in ("length", "offset", "document", "source"):
        assert np.array_equal(getattr(table, name), train[f"segment_{name}"][:])


@given(st.integers(0, 30), st.integers(1, 7), st.data())
def test_slices_are_those_of_the_whole_array(length, chunk, data):
    values = np.arange(length, dtype=np.int64) * 7
    start, stop = data.draw(st.integers(-35, 35)), data.draw(st.integers(-35, 35))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "array"
        arrays.write_metadata(path, (length,), (chunk,), values.dtype)
        for number, first in enumerate(range(0, length, chunk)):
            part = np.zeros(chunk, np.int64)
            part[: len(values[first : first + chunk])] = values[first : first + chunk]
            arrays.write_chunk(path / "c" / str(number), part)
        ours, theirs = open_array(path), zarr.open_array(path, mode="r")
        assert np.array_equal(ours[start:stop], values[start:stop])
        assert np.array_equal(theirs[:], values)


@given(st.lists(st.integers(0, 9), max_size=20))
def test_rows_are_taken_in_the_order_asked_for(rows):
    tokens = np.arange(40, dtype=np.uint16).reshape(10, 4)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), tokens, 3)
        assert np.array_equal(open_array(Path(folder)).take(rows), tokens[np.array(rows, int)])


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)).map(sorted), max_size=6))
def test_slices_come_one_after_another(borders):
    tokens = np.arange(20, dtype=np.uint16).reshape(10, 2)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), tokens, 3)
        found = open_array(Path(folder)).slices(np.array(borders, np.int64).reshape(-1, 2))
    assert found.tolist() == [row for first, last in borders for row in tokens[first:last].tolist()]


@pytest.mark.parametrize("index", [-1, 10])
def test_what_is_not_there_is_an_index_error_however_it_is_read(tmp_path, index):
    write_tokens(tmp_path, np.zeros((10, 4), np.uint16), 3)
    array = open_array(tmp_path)
    for read in (array.take, array.will_need):
        with pytest.raises(IndexError):
            read([2, index])


@pytest.mark.parametrize("length", [3, 1000])
def test_rows_that_were_asked_for_ahead_are_the_same(tmp_path, length):
    """Rows that begin and end inside pages, or cross them, to the last one of the file."""
    tokens = np.random.default_rng(0).integers(9, size=(9, length), dtype=np.uint16)
    write_tokens(tmp_path, tokens, 3)
    array = ChunkedArray(tmp_path, DiskChunks(), is_read_in_order=False)
    array.will_need(range(9))
    assert np.array_equal(array.take(range(9)), tokens)


def test_a_row_is_expanded(dataset_path):
    row = open_dataset(dataset_path).train[0]
    assert row.tokens.tolist() == [1, 2, 3, 4, 5, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 2, 2, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1, 0]
    assert row.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert row.labels.tolist() == [2, 3, -100, 5, -100, -100]
    assert row.segments.document.tolist() == [2**40, 2**40 + 1]


def test_row_targets_are_the_labels_that_count(dataset_path):
    train = open_dataset(dataset_path).train
    assert train.row_targets[:].tolist() == [int((train[row].labels != -100).sum()) for row in range(len(train))]


def test_targets_come_in_the_order_of_the_rows_asked_for(dataset_path):
    train = open_dataset(dataset_path).train
    assert train.targets([2, 0, 0]).tolist() == [train.row_targets[:][row] for row in (2, 0, 0)]


def test_the_longest_segment_is_that_of_all_rows(dataset_path):
    train = open_dataset(dataset_path).train
    assert train.longest_segment() == train.segments(range(len(train))).length.max()


def test_segments_come_in_the_order_of_the_rows_asked_for(dataset_path):
    table = open_dataset(dataset_path).train.segments([2, 3, 0])
    assert table.per_row.tolist() == [3, 0, 2]
    assert table.length.tolist() == [1, 1, 1, 3, 2]


def test_what_training_reads_of_segments_is_in_the_whole_table(dataset_path):
    train = open_dataset(dataset_path).train
    table, rows = train.segments([2, 3, 0]), train.row_segments([2, 3, 0])
    for name in rows._fields:
        assert getattr(rows, name).tolist() == getattr(table, name).tolist()


@pytest.mark.parametrize("row", [4, -1, -3, 10**9])
def test_a_row_that_is_not_there_is_an_index_error(dataset_path, row):
    train = open_dataset(dataset_path).train
    with pytest.raises(IndexError):
        train.tokens([row])
    with pytest.raises(IndexError):
        train.segments([row])


def test_what_a_caller_does_to_a_row_does_not_change_the_dataset(dataset_path):
    train = open_dataset(dataset_path).train
    train[0].tokens[:] = 9
    train.row_targets[:][:] = 9
    assert train[0].tokens.tolist() == [1, 2, 3, 4, 5, 0]
    assert train.row_targets[0:1].tolist() == [3]


def test_steps_are_not_supported(dataset_path):
    with pytest.raises(ValueError, match="only plain slices"):
        open_dataset(dataset_path).train.row_targets[::2]


def test_nothing_held_out_has_no_validation(dataset_path):
    assert open_dataset(dataset_path).validation is None


def test_equal_content_has_an_equal_digest(tmp_path):
    one, other = write_dataset(tmp_path / "one"), write_dataset(tmp_path / "other")
    assert open_dataset(one).digest == open_dataset(other).digest
    assert open_dataset(one).digest != open_dataset(write_dataset(tmp_path / "wide", "uint32")).digest


def test_opening_notices_a_missing_a_truncated_and_an_oversized_file(dataset_path):
    train = dataset_path / "train"
    (train / "tokens" / "c" / "0" / "0").unlink()
    for name, change in (("segment_length", b""), ("row_offsets", b"much longer" * 100)):
        (train / name / "c" / "0").write_bytes(change)
    with pytest.raises(FormatError) as error:
        open_dataset(dataset_path)
    assert [kind in str(error.value) for kind in ("missing", "truncated", "oversized")] == [True] * 3


def test_opening_names_at_most_five_files(dataset_path):
    for path in (dataset_path / "train").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(FormatError, match=r"\(\d+ more\)"):
        open_dataset(dataset_path)


@pytest.mark.parametrize(
    "change",
    [
        {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}]},
        {"codecs": None},
        {"chunk_grid": {"name": "rectangular"}},
        {"chunk_grid": []},
    ],
)
def test_an_array_with_other_codecs_is_refused(dataset_path, change):
    meta = dataset_path / "train" / "tokens" / "zarr.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    seal(dataset_path)
    with pytest.raises(FormatError, match=r"train/tokens"):
        open_dataset(dataset_path)


@pytest.mark.parametrize("key", ["shape", "data_type", "chunk_grid", "codecs"])
def test_an_array_description_without_a_key_is_refused(dataset_path, key):
    meta = dataset_path / "train" / "row_offsets" / "zarr.json"
    meta.write_text(json.dumps({name: value for name, value in json.loads(meta.read_text()).items() if name != key}))
    seal(dataset_path)
    with pytest.raises(FormatError, match=r"zarr\.json"):
        open_dataset(dataset_path)


def test_a_chunk_that_is_too_short_to_map_is_a_format_error(dataset_path):
    (dataset_path / "train" / "tokens" / "c" / "0" / "0").write_bytes(b"short")
    seal(dataset_path)
    with pytest.raises(FormatError, match="cannot be mapped"):
        open_dataset(dataset_path).train.tokens([0])


MaskedRow = list[list[bool]]
"""Of each segment of a row, which tokens are targets: chosen and rejected side in turn."""
WIDE = 14
masks = st.lists(st.booleans(), min_size=1, max_size=6).map(lambda drawn: [False, *drawn])


@st.composite
def masked_rows(draw: st.DrawFn) -> list[MaskedRow]:
    """Rows of 0, 1 or 2 pairs of `WIDE` tokens at most."""
    rows = draw(st.lists(st.lists(st.tuples(masks, masks), max_size=2), min_size=1, max_size=6))
    rows = [list(chain(*pairs)) for pairs in rows]
    return [row if sum(map(len, row)) <= WIDE else row[:2] for row in rows]


def spans_of(row: MaskedRow) -> list[tuple[int, int]]:
    """Start and length of each run of targets; none crosses a segment, whose first token is no target."""
    flat = list(chain(*row))
    edges = np.flatnonzero(np.diff(np.array([False, *flat, False], int))).tolist()
    return [(start, stop - start) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def write_split(path: Path, rows: list[MaskedRow]) -> None:
    """Rows of pairs in arrays of several chunks; tokens count up from 1 through all of them."""
    segments, spans = list(chain(*rows)), [spans_of(row) for row in rows]
    tokens = np.arange(1, len(rows) * WIDE + 1, dtype=np.uint16).reshape(-1, WIDE)
    columns: dict[str, tuple[Any, str]] = {
        "row_offsets": (np.cumsum([0, *map(len, rows)]), "int64"),
        "row_targets": ([sum(chain(*row)) for row in rows], "uint32"),
        "segment_length": ([len(mask) for mask in segments], "uint32"),
        "segment_offset": ([0] * len(segments), "uint32"),
        "segment_document": ([0] * len(segments), "uint64"),
        "segment_source": ([0] * len(segments), "uint16"),
        "span_offsets": (np.cumsum([0, *map(len, spans)]), "int64"),
        "span_start": ([start for start, _ in chain(*spans)], "uint32"),
        "span_length": ([length for _, length in chain(*spans)], "uint32"),
        "pair_offsets": (np.cumsum([0, *map(len, rows)]) // 2, "int64"),
        "row_chosen_targets": ([sum(chain(*row[::2])) for row in rows], "uint32"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "COLUMN_CHUNK", 4)
        for name, (values, dtype) in columns.items():
            arrays.write_column(path / name, [np.array(values, dtype)], len(values), dtype)
        pairs = arrays.ColumnWriter(path / "pair_segments", len(segments) // 2, "uint64", width=2)
        pairs.add(np.arange(len(segments), dtype=np.uint64).reshape(-1, 2))
        pairs.finish()
    write_tokens(path / "tokens", tokens, 2)


@given(masked_rows(), st.data())
def test_spans_and_pairs_are_those_of_the_rows_asked_for(rows, data):
    """In any order, with repeats, or of no row at all."""
    asked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    with tempfile.TemporaryDirectory() as folder:
        write_split(Path(folder), rows)
        split = Split(Path(folder), ArrayFolder(Path(folder)), has_spans=True, has_pairs=True)
        spans, pairs, table = split.spans(asked), split.pairs(asked), split.segments(np.array(asked, np.int64))
    wanted = [(place * WIDE + start, n) for place, row in enumerate(asked) for start, n in spans_of(rows[row])]
    assert list(zip(spans.start.tolist(), spans.length.tolist(), strict=True)) == wanted
    assert (spans.start.dtype, spans.length.dtype) == (np.int64, np.int64)
    assert table.length.tolist() == [len(mask) for row in asked for mask in rows[row]]
    assert pairs.per_row.tolist() == [len(rows[row]) // 2 for row in asked]
    assert pairs.segments.shape == (pairs.per_row.sum(), 2)
    assert pairs.segments.ravel().tolist() == list(range(len(table.length)))
    assert pairs.chosen_targets.tolist() == [sum(chain(*rows[row][::2])) for row in asked]


@given(masked_rows())
def test_a_row_with_spans_is_expanded_to_the_labels_inside_them(rows):
    with tempfile.TemporaryDirectory() as folder:
        write_split(Path(folder), rows)
        split = Split(Path(folder), ArrayFolder(Path(folder)), has_spans=True)
        found = [split[row] for row in range(len(rows))]
    for number, (row, expanded) in enumerate(zip(rows, found, strict=True)):
        flat = [*chain(*row), *[False] * WIDE][:WIDE]
        following = zip([*flat[1:], False], range(number * WIDE + 2, (number + 1) * WIDE + 2), strict=True)
        assert expanded.labels.tolist() == [token if is_target else IGNORE for is_target, token in following]
        assert list(zip(*(column.tolist() for column in expanded.spans), strict=True)) == spans_of(row)


def test_text_has_neither_spans_nor_pairs(dataset_path):
    train = open_dataset(dataset_path).train
    assert (train.spans([0]), train.pairs([0]), train[0].spans) == (None, None, None)


@pytest.mark.parametrize("row", [3, -1, -3, 10**9])
def test_spans_and_pairs_of_a_row_that_is_not_there_are_an_index_error(tmp_path, row):
    write_split(tmp_path, [[[False, True], [False, True]]] * 3)
    split = Split(tmp_path, ArrayFolder(tmp_path), has_spans=True, has_pairs=True)
    with pytest.raises(IndexError):
        split.spans([0, row])
    with pytest.raises(IndexError):
        split.pairs([0, row])
