"""Ten thousand records of junk: each is stored or in quarantine under its own number, and none ends the run."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import fuzzed_records as fuzz
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
import zstandard
from fuzzed_records import LIMIT, Expected
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc
from tokenizers import Tokenizer

from llmt_prep.config import MixConfig
from llmt_prep.documents import BadRecord, End, Reading, lines, read, split_into_units
from llmt_prep.ledger import Ledger, mistakes
from llmt_prep.pipeline import build_dataset
from llmt_prep.tokenization import TextSettings, tokenize_unit
from llmt_prep.tokenizer import load_tokenizer
from llmt_prep.verify import find_problems
from llmt_shared.errors import DataError

LENGTH = 2 * LIMIT
"""Rows so long that no document is cut."""


class Fuzzed(NamedTuple):
    """A finished dataset of junk, and what is expected in it."""

    path: Path
    expected: dict[str, dict[str, Expected]]
    """By source and file."""


def compressed(raw: bytes, suffix: str, members: int) -> bytes:
    size = -(-len(raw) // members)
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    return b"".join(compress(raw[start : start + size]) for start in range(0, len(raw), size))


def write_lines(folder: Path, random: Random) -> Iterator[tuple[str, Path, Expected]]:
    """JSON lines, with and without compression, byte order mark, CRLF and line feed at the end."""
    for name, count, start, feed in (("a.jsonl", 5000, b"", b"\n"), ("b.jsonl", 1000, fuzz.BOM, b"\r\n")):
        raw = start + feed.join(fuzz.json_lines(random, count)) + feed
        (folder / name).write_bytes(raw)
        yield "plain", folder / name, fuzz.expected_of_json_lines(raw)
    for suffix in (".gz", ".zst"):
        raw = b"\n".join(fuzz.json_lines(random, 1000))
        path = folder / f"c.jsonl{suffix}"
        path.write_bytes(compressed(raw, suffix, members=7))
        yield "compressed", path, fuzz.expected_of_json_lines(raw)


def write_texts(folder: Path, random: Random) -> Iterator[tuple[str, Path, Expected]]:
    """Plain text, in each of the ways to cut it into records."""
    for record, count in (("line", 1000), ("paragraph", 1500)):
        raw = random.choice([b"\n", b"\r\n"]).join(fuzz.text_lines(random, count))
        path = folder / f"{record}.txt.gz"
        path.write_bytes(compressed(raw, ".gz", members=3))
        yield record, path, fuzz.expected_of_text(raw, record)
    for number in range(60):
        raw = fuzz.BOM * (number % 2) + b"\n".join(fuzz.text_lines(random, number % 4))
        (folder / f"{number}.md").write_bytes(raw)
        yield "file", folder / f"{number}.md", fuzz.expected_of_text(raw, "file")


def write_tables(folder: Path, random: Random) -> Iterator[tuple[str, Path, Expected]]:
    """Parquet and Arrow, with every type of string column."""
    for kind in ("string", "large_string", "string_view", "dictionary"):
        for name in ("a.parquet", "file.arrow", "stream.arrow"):
            cells = fuzz.cells(random, 150)
            path = folder / f"{kind}-{name}"
            write_table(path, pa.table({"id": range(len(cells)), "text": column(cells, kind)}))
            yield "tables", path, dict(enumerate(map(fuzz.decoded, cells)))


def column(cells: list[bytes | None], kind: str) -> pa.Array:
    """A column of strings, whatever its bytes are: Arrow does not look at them."""
    if kind == "dictionary":
        return column(cells, "string").dictionary_encode()
    binary = {"string": pa.binary(), "large_string": pa.large_binary(), "string_view": pa.binary_view()}[kind]
    return pa.Array.from_buffers(getattr(pa, kind)(), len(cells), pa.array(cells, binary).buffers())


def write_table(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=40)
        return
    new = ipc.new_file if "file" in path.name else ipc.new_stream
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=40)


def write_bombs(folder: Path) -> Iterator[tuple[str, Path, Expected]]:
    """A megabyte or less that inflates to one line of GiBs between good ones; members and frames make one stream."""
    for suffix, compress, members in ((".gz", gzip.compress, 16), (".zst", zstandard.compress, 32)):
        path = folder / f"bomb.jsonl{suffix}"
        first, last = compress(b'{"text": "before"}\n{"text": "'), compress(b'"}\n{"text": "behind"}\n')
        path.write_bytes(first + compress(bytes(1 << 26)) * members + last)
        yield "bombs", path, {0: "before", 1: None, 2: "behind"}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Fuzzed:
    folder, random = tmp_path_factory.mktemp("fuzz"), Random(3)
    written = [*write_lines(folder, random), *write_texts(folder, random), *write_tables(folder, random)]
    written += write_bombs(folder)
    expected: dict[str, dict[str, Expected]] = {}
    for source, path, records in written:
        expected.setdefault(source, {})[str(path)] = records
    sources = {
        name: {"path": sorted(files), "record": name if name in ("line", "paragraph") else "file"}
        for name, files in expected.items()
    }
    mix = {
        "output": folder / "out" / "data", "tokenizer": str(tokenizer_dir), "sequence": {"length": LENGTH},
        "max_bad": "100%", "max_record_bytes": LIMIT, "unit_size": 50_000, "shard_size": 300_000,
        "holdout": {"fraction": 0.1}, "sources": sources,
    }  # fmt: skip
    return Fuzzed(build_dataset(MixConfig.model_validate(mix), workers=1).path, expected)


def stored_texts(dataset: Path, tokenizer: Tokenizer) -> list[tuple[str, int, str]]:
    """File, record and decoded text of every document in the rows, from plain zarr and `tokenizers`."""
    files = pq.read_table(dataset / "files.parquet").to_pydict()
    first = np.array(files["first_document"], np.int64)
    found = []
    for split in ("train", "validation"):
        group = zarr.open(dataset / split, mode="r")
        rows, lengths, numbers = (group[name][:] for name in ("tokens", "segment_length", "segment_document"))
        per_row = np.diff(group["row_offsets"][:])
        pieces = [
            ids
            for row, mine in zip(rows, np.split(lengths, np.cumsum(per_row)[:-1]), strict=True)
            for ids in np.split(row, np.cumsum(mine))[:-1]
        ]
        assert all(ids[-1] == 0 for ids in pieces)  # EOS
        texts = tokenizer.decode_batch([ids[:-1].tolist() for ids in pieces], skip_special_tokens=False)
        file = np.searchsorted(first, numbers.astype(np.int64), "right") - 1
        found += [
            (files["path"][f], int(n) - int(first[f]), text) for f, n, text in zip(file, numbers, texts, strict=True)
        ]
    return found


def test_there_are_ten_thousand_records_of_which_many_are_bad(fuzzed: Fuzzed) -> None:
    records = [text for files in fuzzed.expected.values() for file in files.values() for text in file.values()]
    kinds = Counter("bad" if text is None else "good" if text else "empty" for text in records)
    assert len(records) >= 10_000
    assert kinds["bad"] > 3000
    assert kinds["good"] > 3000
    assert kinds["empty"] > 100


def test_every_bad_record_is_in_quarantine_under_its_file_and_number(fuzzed: Fuzzed) -> None:
    found = [json.loads(line) for line in (fuzzed.path / "quarantine.jsonl").read_text().splitlines()]
    wanted = [
        (source, file, number)
        for source, files in fuzzed.expected.items()
        for file in sorted(files)
        for number, text in files[file].items()
        if text is None
    ]
    assert [(bad["source"], bad["file"], bad["record"]) for bad in found] == wanted
    assert all(bad["reason"] for bad in found)


def test_every_good_record_is_stored_once_and_reads_back_as_it_was(fuzzed: Fuzzed, tokenizer_dir: Path) -> None:
    found = stored_texts(fuzzed.path, Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")))
    wanted = {
        (file, number): text
        for files in fuzzed.expected.values()
        for file, records in files.items()
        for number, text in records.items()
        if text
    }
    assert len(found) == len(wanted)
    assert {(file, number): text for file, number, text in found} == wanted


def test_the_books_of_junk_close(fuzzed: Fuzzed) -> None:
    ledger = Ledger.model_validate_json((fuzzed.path / "ledger.json").read_bytes())
    assert mistakes(ledger, LENGTH) == []
    for name, files in fuzzed.expected.items():
        texts = [text for records in files.values() for text in records.values()]
        books = ledger.sources[name]
        assert books.records == len(texts)
        assert (books.empty, books.quarantined) == (texts.count(""), texts.count(None))


def test_verify_finds_nothing_wrong_with_what_is_made_of_junk(fuzzed: Fuzzed) -> None:
    assert find_problems(fuzzed.path) == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_of_blank_lines_is_split_by_the_mebibyte(tmp_path: Path, suffix: str) -> None:
    """A kilobyte of zstd may be 32 million line feeds, which are a list of 256 MB where they are split at once."""
    path = tmp_path / f"bomb.jsonl{suffix}"
    path.write_bytes(compressed(b"\n" * (1 << 25), suffix, members=1))
    (unit,) = split_into_units(path, "auto", 1)
    sizes = [len(piece) for piece in lines._contents(unit)]
    assert sum(sizes) == 1 << 25
    assert max(sizes) <= 1 << 20


def test_the_reason_of_a_bad_record_is_short_however_long_its_keys_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"k" * 1_000_000 + str(i): i for i in range(20)}) + "\n")
    bad, _ = read(split_into_units(path, "auto", 1 << 30)[0], Reading())
    assert isinstance(bad, BadRecord)
    assert "no field 'text'; its fields: 'kkk" in bad.reason
    assert len(bad.reason) < 1000


def test_a_frame_of_zstd_long_is_not_called_damaged(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(writer.compress(b'{"text": "a"}') + writer.flush())
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: .*compress it again without `--long`"):
        list(read(split_into_units(path, "auto", 1)[0], Reading()))


GOOD = [b'{"text": "a"}', b'{"text": ""}', b'{"text": "<|endoftext|>"}']
SAMPLES = [*GOOD, b'{"text": 5}', b"{", b"", b" ", b"\xff", b"x" * 99]
MARKS = [b"\n", b"\r\n", b"\\u", b"d800", b"\xff", b"\xef\xbb\xbf", b"\0", b" "]
PARTS = [*MARKS, b'{"text": "', b'"}', b'"', b"{", b"}", b"a", b":"]


@given(st.one_of(st.binary(), st.lists(st.sampled_from(PARTS), max_size=40).map(b"".join)))
def test_any_bytes_are_documents_or_empty_or_bad(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "a.jsonl"
    path.write_bytes(raw)
    *items, end = read(split_into_units(path, "auto", 1 << 30)[0], Reading(max_record_bytes=LIMIT))
    found = {item.record: getattr(item, "text", None) for item in items}  # a bad record has none
    assert found == fuzz.expected_of_json_lines(raw)
    rest = raw.removeprefix(fuzz.BOM)
    assert end == End(rest.count(b"\n") + (rest != b"" and not rest.endswith(b"\n")))


@given(st.lists(st.sampled_from(SAMPLES), max_size=30))
def test_the_counts_of_a_unit_add_up(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, records: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("units") / "a.jsonl"
    path.write_bytes(b"\n".join(records))
    (unit,) = split_into_units(path, "auto", 1 << 30)
    meta = tokenize_unit(unit, Reading(), load_tokenizer(str(tokenizer_dir)), TextSettings(), path.with_name("unit"))
    texts = list(fuzz.expected_of_json_lines(path.read_bytes()).values())
    assert meta.records == meta.documents + meta.empty + meta.quarantined == len(texts)
    assert (meta.empty, meta.quarantined) == (texts.count(""), texts.count(None))


DAMAGE = """
import sys
from pathlib import Path
from random import Random
from llmt_prep.documents import Reading, read, split_into_units
from llmt_shared.errors import LlmtError

random, outcomes = Random(1), set()
for name in sys.argv[2:]:
    whole, path = Path(sys.argv[1], name).read_bytes(), Path(sys.argv[1], "damaged-" + name)
    for _ in range(200):
        raw = bytearray(whole)
        for _ in range(random.randrange(1, 4)):
            raw[random.randrange(len(raw))] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)])
        path.write_bytes(raw)
        try:
            for unit in split_into_units(path, "auto", 3000):
                outcomes.add(type(list(read(unit, Reading(max_record_bytes=4096)))[-1]).__name__)
        except LlmtError as error:
            assert path.name in str(error), error
            outcomes.add(type(error).__name__)
print(*sorted(outcomes))
"""
TABLES = ["string-file.arrow", "string_view-stream.arrow", "dictionary-stream.arrow", "string-a.parquet"]
COMPRESSED = ["a.jsonl.gz", "a.jsonl.zst"]


def test_a_file_with_flipped_bytes_is_read_or_named_and_never_ends_the_process(tmp_path: Path) -> None:
    for name in TABLES:
        cells: list[bytes | None] = [b"some text of a row " * (i % 9) for i in range(200)]
        write_table(tmp_path / name, pa.table({"id": range(200), "text": column(cells, name.partition("-")[0])}))
    for name in COMPRESSED:
        raw = b"".join(b'{"text": "the text of line %d"}\n' % i for i in range(400))
        (tmp_path / name).write_bytes(compressed(raw, Path(name).suffix, members=3))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DAMAGE, str(tmp_path), *TABLES, *COMPRESSED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.returncode, result.stderr)
    assert {"DataError", "End"} <= set(result.stdout.split())
