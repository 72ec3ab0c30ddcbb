"""Reading: every file format gives the same records, and a bad record spoils only itself."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc

from llmt_prep.documents import (
    BadRecord,
    Document,
    End,
    Item,
    Reading,
    Unit,
    find_files,
    hf_files,
    lines_before,
    read,
    split_into_units,
    unit_bytes,
)
from llmt_shared.errors import ConfigError, DataError

JSONL = Reading()
TEXTS = ["first", "second\nwith a line feed", "", "naïve 日本語 \U0001f600", "  ", "NUL \0 inside"]


def read_whole(path: Path, reading: Reading = JSONL, bytes_per_unit: int = 1 << 30) -> list[Item]:
    """All records of a file with global numbers, then one End with all lines."""
    items: list[Item] = []
    before = 0
    for unit in split_into_units(path, reading.reader, bytes_per_unit):
        assert lines_before(unit) == before
        *records, end = read(unit, reading)
        assert isinstance(end, End)
        items += [item._replace(record=item.record + before) for item in records]
        before += end.lines
    return [*items, End(before)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def only_bad(path: Path, reading: Reading = JSONL) -> BadRecord:
    (bad, _) = read_whole(path, reading)
    assert isinstance(bad, BadRecord)
    return bad


def compressed(path: Path, raw: bytes) -> Path:
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else zstandard.compress(raw))
    return path


# JSON lines


def test_every_text_comes_back_with_its_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert read_whole(path) == [*(Document(i, text) for i, text in enumerate(TEXTS)), End(len(TEXTS))]


@given(
    st.lists(st.sampled_from([b"", b"  ", b'{"text": "x"}', b'{"text": "' + b"long" * 9 + b'"}', b"{bad", b"\xff"])),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
)
def test_units_of_any_size_give_the_same_records(tmp_path_factory, lines, feed, ends_with_feed, bom):
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * bom + feed.join(lines) + feed * ends_with_feed)
    whole = read_whole(path)
    for bytes_per_unit in (1, 2, 3, 7, 16, 50):
        assert read_whole(path, bytes_per_unit=bytes_per_unit) == whole
        stored = b"".join(
            piece for unit in split_into_units(path, "auto", bytes_per_unit) for piece in unit_bytes(unit)
        )
        assert stored == path.read_bytes()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_equal_the_plain_one(tmp_path, suffix):
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS * 1000)
    assert read_whole(compressed(tmp_path / f"a.jsonl{suffix}", plain.read_bytes())) == read_whole(plain)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_concatenated_members_are_read_as_one_file(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    members = [compressed(path, raw).read_bytes() for raw in (b'{"text": "a"}\n{"te', b"", b'xt": "b"}')]
    path.write_bytes(b"".join(members))
    assert read_whole(path) == [Document(0, "a"), Document(1, "b"), End(2)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compression_is_an_error_after_the_readable_lines(tmp_path, suffix):
    raw = b"".join(json.dumps({"text": os.urandom(50).hex()}).encode() + b"\n" for _ in range(5000))
    path = compressed(tmp_path / f"a.jsonl{suffix}", raw)
    path.write_bytes(path.read_bytes()[:-100])
    seen = []
    with pytest.raises(DataError, match=r"a\.jsonl.*cut short"):
        seen.extend(read(split_into_units(path, "auto", 1)[0], JSONL))
    assert len(seen) > 3000
    assert [item.text for item in seen] == [json.loads(line)["text"] for line in raw.splitlines()[: len(seen)]]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_plain_file_under_a_compressed_name_is_an_error(tmp_path, suffix):
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", ["x"])
    with pytest.raises(DataError, match="not a whole"):
        read_whole(path)


BAD_LINES = {
    b'{"text": "a",}': "not valid JSON: trailing comma is not allowed at column 13",
    b'{"text": "a"': "not valid JSON",
    b'{"text": "a"} {"text": "b"}': "not valid JSON: unexpected content after document at column 15",
    b'{"text": NaN}': "not valid JSON",
    b'["a"]': "a list; wanted an object with the field 'text'",
    b'"a"': "a string; wanted an object with the field 'text'",
    b'{"txt": "a", "id": 1}': "no field 'text'; its fields: 'txt', 'id'",
    b'{"text": 5}': "field 'text' is a number; wanted a string",
    b'{"text": {"a": "b"}}': "field 'text' is an object; wanted a string",
    b'{"text": null}': "field 'text' is null; wanted a string",
    b'{"text": "a\xff"}': "invalid UTF-8 at byte 11",
    b'{"text": "\\ud800"}': "lone surrogate at column 11",
    b'{"text": "\xed\xa0\x80"}': "invalid UTF-8 at byte 10",
    b'\xef\xbb\xbf{"text": "a"}': "byte order mark (BOM) inside the file",
    b"[" * 5000: "not valid JSON: depth limit exceeded",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items())
def test_a_bad_line_is_named_and_its_neighbours_are_read(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n\n{"text": "behind"}')
    before, bad, behind, end = read_whole(path)
    assert (before, behind, end) == (Document(0, "before"), Document(3, "behind"), End(4))
    assert isinstance(bad, BadRecord)
    assert bad.record == 1
    assert reason in bad.reason
    assert bad.preview == line[:160].decode("utf-8", "replace")


def test_a_byte_order_mark_at_the_start_is_no_part_of_the_first_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert read_whole(path) == [Document(0, "a"), End(1)]


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n\n"])
def test_a_file_without_records_is_fine(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert read_whole(path) == [End(content.count(b"\n"))]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_record_above_the_limit_is_skipped(tmp_path, suffix):
    lines = [b'{"text": "a"}', b'{"text": "' + b"x" * 5_000_000 + b'"}', b'{"text": "b"}']
    path = tmp_path / f"a.jsonl{suffix}"
    if suffix:
        compressed(path, b"\n".join(lines))
    else:
        path.write_bytes(b"\n".join(lines))
    first, bad, last, _ = read_whole(path, Reading(max_record_bytes=100_000))
    assert (first, last) == (Document(0, "a"), Document(2, "b"))
    assert bad.reason == "record of 5000012 bytes, more than max_record_bytes = 100000"
    assert len(bad.preview) == 160


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_bomb_is_skipped_in_bounded_memory(tmp_path, suffix, name):
    path = compressed(tmp_path / f"{name}{suffix}", bytes(300 << 20))
    tracemalloc.start()
    try:
        bad = only_bad(path, Reading(max_record_bytes=1 << 20))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "more than max_record_bytes" in bad.reason
    assert peak < 120 << 20


def test_a_document_of_20_mb_on_one_line_is_read(tmp_path):
    text = "wörd " * 3_400_000
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + '\n{"text": "b"}\n')
    assert path.stat().st_size > 20_000_000
    assert read_whole(path, bytes_per_unit=5_000_000) == [Document(0, text), Document(1, "b"), End(2)]


def test_the_text_field_is_chosen(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1, "body": "b"}\n')
    assert read_whole(path, Reading(text_field="body")) == [Document(0, "b"), End(1)]


def test_a_unit_hashes_the_end_of_its_last_line(tmp_path):
    """What the unit's documents depend on lies partly behind its range."""
    path = write_jsonl(tmp_path / "a.jsonl", ["a" * 50, "b" * 50])
    first, *_ = split_into_units(path, "auto", 10)
    assert b"".join(unit_bytes(first)) == path.read_bytes().splitlines(keepends=True)[0]


# text


def read_text(path: Path, record: str, **settings: int) -> list[Item]:
    return read_whole(path, Reading(reader="text", record=record, **settings))


def test_a_text_file_is_one_record(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert read_text(path, "file") == [Document(0, "one\r\n\r\ntwo\n"), End(1)]


def test_lines_of_a_text_file_keep_their_numbers(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\n  \ntwo\nbad\xff\n thr\xc3\xa9e")
    assert read_text(path, "line") == [
        Document(0, "one"),
        Document(3, "two"),
        BadRecord(4, "invalid UTF-8 at byte 3 of the record (invalid start byte)", "bad�"),
        Document(5, " thrée"),
        End(6),
    ]


def test_paragraphs_have_the_number_of_their_first_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\r\nstill one\n \t\r\n\ntwo\n")
    assert read_text(path, "paragraph") == [Document(2, "one\nstill one"), Document(6, "two"), End(7)]


def test_a_paragraph_above_the_limit_is_skipped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\n\n" + "0123456789\n" * 200 + "\nb\n")
    first, bad, last, _ = read_text(path, "paragraph", max_record_bytes=1024)
    assert (first, last) == (Document(0, "a"), Document(203, "b"))
    assert bad.record == 2
    assert "more than max_record_bytes" in bad.reason


def test_a_compressed_text_file_equals_the_plain_one(tmp_path):
    raw = "one\ntwo\n\nthree é\n".encode() * 1000
    (tmp_path / "a.txt").write_bytes(raw)
    for suffix in (".gz", ".zst"):
        path = compressed(tmp_path / f"b.txt{suffix}", raw)
        for record in ("file", "line", "paragraph"):
            assert read_text(path, record) == read_text(tmp_path / "a.txt", record)


# Parquet and Arrow


def write_table(path: Path, table: pa.Table, rows: int) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
        return path
    new = ipc.new_file if path.name.startswith("file") else ipc.new_stream
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


TABLE_NAMES = ["a.parquet", "file.arrow", "stream.arrow"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("name", TABLE_NAMES)
def test_string_columns_of_each_type_are_read(tmp_path, name, kind):
    table = pa.table({"id": [1, 2, 3], "text": pa.array(["a", None, "ç" * 40], kind)})
    items = read_whole(write_table(tmp_path / name, table, 2))
    assert items == [
        Document(0, "a"),
        BadRecord(1, "column 'text' is null; wanted a string", ""),
        Document(2, "ç" * 40),
        End(3),
    ]


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_units_of_a_table_of_any_size_give_the_same_records(tmp_path, name):
    texts = [f"text {i} " * (i % 7) for i in range(3000)]
    path = write_table(tmp_path / name, pa.table({"text": texts}), 250)
    whole = [*(Document(i, text) for i, text in enumerate(texts)), End(3000)]
    hashed = set()
    for bytes_per_unit in (1, 5000, 20_000, 1 << 30):
        assert read_whole(path, bytes_per_unit=bytes_per_unit) == whole
        hashed |= {b"".join(unit_bytes(unit)) for unit in split_into_units(path, "auto", bytes_per_unit)}
    assert len(split_into_units(path, "auto", 1)) == 12
    assert len(hashed) > 12


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_dictionary_columns_are_read(tmp_path, name):
    column = pa.array(["a", "b", "a", None]).dictionary_encode()
    path = write_table(tmp_path / name, pa.table({"text": column}), 2)
    assert [getattr(item, "text", None) for item in read_whole(path)] == ["a", "b", "a", None, None]


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_invalid_utf8_spoils_only_its_row(tmp_path, name):
    raw = pa.array([b"good", b"b\xe4d", b"fine"], pa.binary())
    path = write_table(tmp_path / name, pa.table({"text": raw.view(pa.string())}), 3)
    good, bad, fine, _ = read_whole(path)
    assert (good, fine) == (Document(0, "good"), Document(2, "fine"))
    assert bad == BadRecord(1, "invalid UTF-8 at byte 1 of the text (invalid continuation byte)", "b�d")


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_an_empty_table_is_fine(tmp_path, name):
    path = write_table(tmp_path / name, pa.table({"text": pa.array([], pa.string())}), 1)
    assert read_whole(path) == [End(0)]


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_a_row_above_the_limit_is_skipped(tmp_path, name):
    path = write_table(tmp_path / name, pa.table({"text": ["é" * 1000, "b"]}), 10)
    bad, good, _ = read_whole(path, Reading(max_record_bytes=1500))
    assert bad.reason == "record of 2000 bytes, more than max_record_bytes = 1500"
    assert good == Document(1, "b")


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_a_missing_or_wrong_column_names_what_there_is(tmp_path, name):
    path = write_table(tmp_path / name, pa.table({"id": [1], "body": ["x"]}), 1)
    with pytest.raises(ConfigError, match=r"no column 'text'; it has id \(int64\), body \(string\)"):
        read_whole(path)
    with pytest.raises(ConfigError, match="column 'id' is of type int64; wanted string"):
        read_whole(path, Reading(text_field="id"))


@pytest.mark.parametrize("name", TABLE_NAMES)
@pytest.mark.parametrize("keep", [0, 3, 0.5, -3])
def test_a_damaged_table_is_an_error_that_names_it(tmp_path, name, keep):
    path = write_table(tmp_path / name, pa.table({"text": ["some text"] * 1000}), 100)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    if name == "file.arrow" and keep == -3:
        assert read_whole(path)[-1] == End(1000)  # only the footer is cut; every batch and the end mark are there
        return
    with pytest.raises(DataError, match="not a readable"):
        read_whole(path)


def test_a_stream_whose_writer_was_killed_is_an_error(tmp_path):
    """All its batches are whole; only the end mark is missing."""
    path = write_table(tmp_path / "stream.arrow", pa.table({"text": ["a"] * 10}), 5)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="no end mark"):
        read_whole(path)


def test_another_text_in_a_parquet_file_gives_other_bytes_to_hash(tmp_path):
    seen = set()
    for text in ("aaaa", "bbbb"):
        path = write_table(tmp_path / "a.parquet", pa.table({"text": ["same", text]}), 1)
        seen |= {b"".join(unit_bytes(unit)) for unit in split_into_units(path, "auto", 1)}
    assert len(seen) >= 3


# files


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(found: list[Path], below: Path) -> list[str]:
    return [path.relative_to(below).as_posix() for path in found]


def test_a_folder_gives_its_files_of_known_suffixes(tmp_path):
    wanted = ["a.jsonl", "b.ndjson.zst", "c/d/e.parquet", "c/f.MD", "g.rst.gz", "h.arrow"]
    touch(*(tmp_path / name for name in [*wanted, "x.json", "README", ".hidden.txt", "y.parquet.gz", ".git/z.txt"]))
    assert names(find_files([str(tmp_path)], JSONL), tmp_path) == sorted(wanted)
    assert names(find_files([str(tmp_path)], Reading(reader="parquet")), tmp_path) == ["c/d/e.parquet"]


def test_globs_folders_and_files_give_each_file_once(tmp_path):
    touch(tmp_path / "a.jsonl", tmp_path / "b/c.jsonl", tmp_path / "b/d.txt", tmp_path / "[odd].txt")
    patterns = [f"{tmp_path}/**/*.jsonl", f"{tmp_path}/b", f"{tmp_path}//a.jsonl", f"{tmp_path}/[odd].txt"]
    assert names(find_files(patterns, JSONL), tmp_path) == ["[odd].txt", "a.jsonl", "b/c.jsonl", "b/d.txt"]


def test_a_link_to_a_folder_gives_no_file_twice(tmp_path):
    touch(tmp_path / "v1/a.jsonl")
    (tmp_path / "v1/here").symlink_to(".")
    (tmp_path / "latest").symlink_to("v1")
    assert names(find_files([str(tmp_path)], JSONL), tmp_path) == ["latest/a.jsonl"]


def test_relative_and_absolute_are_one_file(tmp_path, monkeypatch):
    touch(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert len(find_files(["a.jsonl", str(tmp_path / "a.jsonl")], JSONL)) == 1


def test_a_dead_link_in_a_folder_is_not_passed_over(tmp_path):
    touch(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    assert names(find_files([str(tmp_path)], JSONL), tmp_path) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere.jsonl", "no such file or folder"),
        ("*.zip", "matches no file"),
        ("s*", "matches only folders"),
        ("sub", "no file below this folder ends in .jsonl"),
        ("odd.dat", "the suffix '.dat' does not say how to read it .* set `reader:`"),
        ("*.dat", "the suffix '.dat' does not say how to read it .* set `reader:`"),
    ],
)
def test_a_pattern_that_gives_nothing_is_named(tmp_path, pattern, message):
    touch(tmp_path / "sub/readme.pdf", tmp_path / "odd.dat")
    with pytest.raises(ConfigError, match=message) as error:
        find_files([str(tmp_path / pattern)], JSONL)
    assert pattern.strip("*") in str(error.value)


def test_a_reader_that_is_given_reads_any_suffix(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("x = 1\n")
    reading = Reading(reader="text")
    assert find_files([f"{tmp_path}/*.py"], reading) == [path]
    assert read_whole(path, reading) == [Document(0, "x = 1\n"), End(1)]


def saved_dataset(folder: Path, files: int = 2) -> Path:
    """What `Dataset.save_to_disk` leaves."""
    folder.mkdir(parents=True)
    data = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    for i, name in enumerate(data):
        write_table(folder / name, pa.table({"text": [f"{i}a", f"{i}b"]}), 1)
    touch(folder / "cache-1234.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in data]}))
    return folder


def test_a_saved_dataset_gives_its_data_files_only(tmp_path):
    folder = saved_dataset(tmp_path / "saved")
    found = find_files([str(folder)], JSONL)
    assert names(found, folder) == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert [item.text for path in found for item in read_whole(path)[:-1]] == ["0a", "0b", "1a", "1b"]


def test_a_saved_dataset_with_a_missing_file_is_an_error(tmp_path):
    folder = saved_dataset(tmp_path / "saved")
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"data-00001-of-00002\.arrow is missing"):
        find_files([str(folder)], JSONL)


def test_saved_splits_must_be_chosen(tmp_path):
    saved_dataset(tmp_path / "saved/train")
    with pytest.raises(ConfigError, match=r"holds saved datasets deeper down.*saved/train"):
        find_files([str(tmp_path)], JSONL)
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"one of .*saved/train, .*saved/test"):
        find_files([str(tmp_path / "saved")], JSONL)


# datasets

HF = """
import json, sys
from llmt_prep.documents import Document, Reading, hf_files, read, split_into_units
from llmt_shared.errors import ConfigError
files, commit = hf_files("ds", None, "train", None)
units = [unit for file in files for unit in split_into_units(file, "arrow", 10_000)]
texts = [item.text for unit in units for item in read(unit, Reading()) if isinstance(item, Document)]
errors = []
for arguments in (("ds", None, "tset", None), ("nobody/nothing", None, "train", None), ("ds", "cfg", "train", None)):
    try:
        hf_files(*arguments)
    except ConfigError as error:
        errors.append(str(error))
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps([len(units), texts, commit, errors, heavy]))
"""


def run_offline(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=True)


def test_a_local_dataset_is_read_through_datasets_without_torch(tmp_path):
    texts = [f"text {i}" for i in range(2500)]
    (tmp_path / "ds").mkdir()
    write_jsonl(tmp_path / "ds/train.jsonl", texts)
    units, read_texts, commit, errors, heavy = json.loads(run_offline(HF, tmp_path).stdout.splitlines()[-1])
    assert units > 1
    assert read_texts == texts
    assert commit == ""
    assert "no split 'tset'; it has train" in errors[0]
    assert "nobody/nothing: cannot be loaded" in errors[1]
    assert "'cfg' not found" in errors[2]
    assert heavy == []


def test_a_slice_of_a_split_is_refused():
    with pytest.raises(ConfigError, match="one whole split"):
        hf_files("ds", None, "train[:10%]", None)


def test_units_are_plain_values(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    assert split_into_units(path, "auto", 20) == [Unit(str(path), "jsonl", 0, 20), Unit(str(path), "jsonl", 20, 28)]
