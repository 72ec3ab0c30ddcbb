"""Hashes of input files: equal to those of plain libraries, from one read, and remembered only while they hold."""

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep import documents, hashes
from llmt_prep.executor import HERE
from llmt_prep.hashes import FileStat, Job, UnitHash, hash_file, hash_input, hash_inputs, read_index
from llmt_prep.tokenization import hash_content
from llmt_shared.errors import DataError, Stopped

LONG_AGO = 1_000_000_000_000_000_000


def job(path: Path, unit_size: int = 16, reader: str | None = None) -> Job:
    stat = path.stat()
    reader = reader or documents.reader_for(str(path), "auto")
    return Job(FileStat(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino), reader, unit_size)


def sha256_and_units(job: Job) -> tuple[str, list[UnitHash]]:
    found = hash_input(job)
    return found.sha256, found.units


def names_in(index: Path) -> list[str]:
    """Files that an index knows, the oldest first."""
    return [entry["name"] for entry in read_index(index)]


def old(path: Path, content: bytes) -> Path:
    """A file that was written long ago."""
    path.write_bytes(content)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed, as it happens."""
    names: list[str] = []

    def recorded(job: Job, hash_input: Callable[..., object] = hash_input) -> object:
        names.append(Path(job.file.path).name)
        return hash_input(job)

    monkeypatch.setattr(hashes, "hash_input", recorded)
    return names


def run(index: Path, *jobs: Job, rehash: bool = False) -> list[hashes.FileHashes]:
    return hash_inputs(jobs, index, HERE, rehash=rehash, remember=True)


@given(st.lists(st.binary(max_size=12)), st.integers(1, 40), st.sampled_from(["a.jsonl", "a.txt", "a.jsonl.gz"]))
def test_hashes_are_those_of_the_file_and_of_each_unit_alone(tmp_path_factory, lines, unit_size, name):
    path = tmp_path_factory.mktemp("hashes") / name
    path.write_bytes(gzip.compress(b"\n".join(lines)) if name.endswith(".gz") else b"\n".join(lines))
    sha256, units = sha256_and_units(job(path, unit_size))
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    cut = documents.split_into_units(path, "auto", unit_size)
    assert [tuple(unit) for unit in units] == [(unit.start, unit.stop, hash_content(unit)) for unit in cut]


def test_row_groups_are_hashed_beside_their_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"document {i}" for i in range(100)]}), path, row_group_size=30)
    sha256, units = sha256_and_units(job(path, unit_size=1))
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [unit.content for unit in units] == [
        hash_content(unit) for unit in documents.split_into_units(path, "auto", 1)
    ]
    assert len(units) == 4


def test_lines_are_read_once_for_all_hashes(tmp_path, monkeypatch):
    path, read = old(tmp_path / "a.jsonl", b'{"text": "some words"}\n' * 1000), []
    unit_bytes = documents.unit_bytes
    monkeypatch.setattr(documents, "unit_bytes", lambda unit: (read.append(len(p)) or p for p in unit_bytes(unit)))
    monkeypatch.setattr(hashes, "hash_file", None)
    assert len(hash_input(job(path, unit_size=100)).units) == 230
    assert sum(read) == path.stat().st_size


def test_an_unchanged_file_is_not_hashed_again(tmp_path, hashed):
    path = old(tmp_path / "a.jsonl", b"{}\n" * 9)
    assert run(tmp_path / "index", job(path)) == run(tmp_path / "index", job(path))
    assert hashed == ["a.jsonl"]


@pytest.mark.parametrize("change", ["size", "time", "inode", "unit_size", "reader"])
def test_whatever_changes_is_hashed_again(tmp_path, hashed, change):
    path = old(tmp_path / "a.jsonl", b"{}\n" * 9)
    run(tmp_path / "index", job(path))
    if change == "size":
        old(path, b"{}\n" * 10)
    elif change == "time":
        os.utime(path, ns=(LONG_AGO, LONG_AGO + 1))
    elif change == "inode":
        old(tmp_path / "b.jsonl", b"[]\n" * 9).replace(path)
    more = {"unit_size": 8} if change == "unit_size" else {"reader": "text"} if change == "reader" else {}
    (found,) = run(tmp_path / "index", job(path, **more))
    assert len(hashed) == 2
    assert found == hash_input(job(path, **more))


def test_rehash_does_not_believe_the_index(tmp_path):
    path = old(tmp_path / "a.jsonl", b"old\n")
    run(tmp_path / "index", job(path))
    with path.open("r+b") as file:
        file.write(b"new\n")
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    assert run(tmp_path / "index", job(path))[0].sha256 == hashlib.sha256(b"old\n").hexdigest()
    for rehash in (True, False):
        assert run(tmp_path / "index", job(path), rehash=rehash)[0].sha256 == hashlib.sha256(b"new\n").hexdigest()


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, hashed):
    """A second change may come within the same tick of the file system's clock."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"old\n")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    run(tmp_path / "index", job(path))
    with path.open("r+b") as file:
        file.write(b"new\n")
    os.utime(path, ns=times)
    assert run(tmp_path / "index", job(path))[0].sha256 == hashlib.sha256(b"new\n").hexdigest()


def test_a_file_that_two_sources_name_is_hashed_once(tmp_path, hashed):
    path = old(tmp_path / "a.jsonl", b"{}\n")
    first, second = run(tmp_path / "index", job(path), job(path))
    assert first == second
    assert hashed == ["a.jsonl"]


def test_a_file_of_two_readers_is_remembered_for_both(tmp_path, hashed):
    path = old(tmp_path / "a.jsonl", b"{}\n")
    for _ in range(2):
        run(tmp_path / "index", job(path), job(path, reader="text"))
    assert len(hashed) == 2


def test_a_file_that_changes_while_it_is_hashed_is_named(tmp_path):
    path = old(tmp_path / "a.jsonl", b"{}\n")
    before = job(path)
    path.write_bytes(b"{}\n{}\n")
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        run(tmp_path / "index", before)
    assert not (tmp_path / "index").exists()


def test_what_was_hashed_before_a_stop_is_remembered(tmp_path, monkeypatch, hashed):
    first, second = (old(tmp_path / name, b"{}\n") for name in ("a.jsonl", "b.jsonl"))
    recorded = hashes.hash_input

    def stopped_at_b(job):
        if job.file.path.endswith("b.jsonl"):
            raise Stopped("by a signal")
        return recorded(job)

    monkeypatch.setattr(hashes, "hash_input", stopped_at_b)
    with pytest.raises(Stopped):
        run(tmp_path / "index", job(first), job(second))
    monkeypatch.setattr(hashes, "hash_input", recorded)
    run(tmp_path / "index", job(first), job(second))
    assert hashed == ["a.jsonl", "b.jsonl"]


@given(st.floats(0, 1, exclude_max=True), st.one_of(st.none(), st.integers(0, 7)))
def test_a_flipped_bit_or_a_torn_index_costs_only_hashing(tmp_path_factory, share, bit):
    folder = tmp_path_factory.mktemp("index")
    path, index = old(folder / "a.jsonl", b"{}\n" * 9), folder / "index"
    (wanted,) = run(index, job(path))
    content = bytearray(index.read_bytes())
    place = int(share * len(content))
    if bit is None:
        del content[place:]
    else:
        content[place] ^= 1 << bit
    index.write_bytes(content)
    assert names_in(index) == []
    assert run(index, job(path)) == [wanted]
    assert names_in(index) == [str(path)]


def test_of_two_runs_at_once_neither_loses_what_the_other_remembers(tmp_path, monkeypatch):
    first, second = (old(tmp_path / name, b"{}\n") for name in ("a.jsonl", "b.jsonl"))
    index = tmp_path / "index"

    def meanwhile(job):
        monkeypatch.undo()
        run(index, Job(*second_job))
        return hash_input(job)

    second_job = job(second)
    monkeypatch.setattr(hashes, "hash_input", meanwhile)
    run(index, job(first))
    assert set(names_in(index)) == {str(first), str(second)}


def test_the_index_keeps_all_files_of_the_run_and_a_bounded_number_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_OTHER_FILES", 2)
    paths = [old(tmp_path / f"{i}.jsonl", b"{}\n") for i in range(7)]
    for path in paths[:4]:
        run(tmp_path / "index", job(path))
    run(tmp_path / "index", *map(job, paths[4:]))
    assert [Path(name).name for name in names_in(tmp_path / "index")] == [f"{i}.jsonl" for i in range(2, 7)]


def test_the_index_keeps_a_bounded_number_of_unit_sizes(tmp_path):
    path = old(tmp_path / "a.jsonl", b"{}\n" * 9)
    for unit_size in range(1, 9):
        run(tmp_path / "index", job(path, unit_size))
    (entry,) = read_index(tmp_path / "index")
    assert list(entry["units"]) == ["jsonl 5", "jsonl 6", "jsonl 7", "jsonl 8"]


def test_the_index_has_a_line_of_json_for_each_file(tmp_path):
    paths = [old(tmp_path / name, b"{}\n") for name in ("a.jsonl", "b.jsonl")]
    run(tmp_path / "index", *map(job, paths))
    head, *lines = (tmp_path / "index").read_bytes().splitlines()
    assert head == b"llmt hashes 2"
    for path, line in zip(paths, lines, strict=True):
        entry = json.loads(line.split(b" ", 1)[1])
        assert (entry["name"], entry["sha256"]) == (str(path), hash_file(str(path)))


def test_a_damaged_line_costs_hashing_its_own_file_again(tmp_path, hashed):
    paths = [old(tmp_path / name, b"{}\n") for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    wanted = run(tmp_path / "index", *map(job, paths))
    lines = (tmp_path / "index").read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"sha256", b"sha255")
    (tmp_path / "index").write_bytes(b"".join(lines))
    hashed.clear()
    assert run(tmp_path / "index", *map(job, paths)) == wanted
    assert hashed == ["b.jsonl"]


def test_an_index_of_another_version_is_not_read(tmp_path, hashed):
    path = old(tmp_path / "a.jsonl", b"{}\n")
    run(tmp_path / "index", job(path))
    content = (tmp_path / "index").read_bytes()
    (tmp_path / "index").write_bytes(content.replace(b"llmt hashes 2\n", b"llmt hashes 3\n"))
    run(tmp_path / "index", job(path))
    assert hashed == ["a.jsonl", "a.jsonl"]
    assert (tmp_path / "index").read_bytes() == content


def test_hashes_of_another_cut_go_when_the_content_changed_unseen(tmp_path):
    """A file edited in place, with its time put back, is only seen by `--rehash`, which may use another unit size."""
    path = old(tmp_path / "a.jsonl", b"first\nsecond\n")
    run(tmp_path / "index", job(path, 6))
    inode = path.stat().st_ino
    old(path, b"other\nsecond\n")
    assert path.stat().st_ino == inode
    run(tmp_path / "index", job(path, 100), rehash=True)
    (known,) = run(tmp_path / "index", job(path, 6))
    assert known == hash_input(job(path, 6))
