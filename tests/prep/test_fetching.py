"""Objects as files: a unit that was fetched reads as its file does, and what a network changed is read again."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import object_store
import pytest
import small_sources

from llmt_prep import documents, fetching, hashes
from llmt_prep.documents import Reading, Unit, find_objects, object_stat
from llmt_prep.fetching import at_hand
from llmt_prep.hashes import FileHashes, FileStat, Job, hash_input
from llmt_shared import objects
from llmt_shared.errors import DataError, StoreError

pytestmark = pytest.mark.usefixtures("without_faults")

NAMES = ["web/a.jsonl", "web/b.jsonl", "web/c.jsonl.zst", "web/d.jsonl.gz", "code.parquet", "stream.arrow",
         "file.arrow", "notes.txt"]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sources.write(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def server(server: object_store.Server, corpus: Path) -> object_store.Server:
    object_store.upload(server, corpus, "raw")
    return server


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where copies lie; there are none in the end."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(objects, "PATIENCE", 20)
    yield tmp_path / "temporary"
    assert list((tmp_path / "temporary").iterdir()) == []


def job_of(server: object_store.Server, name: str, unit_size: int = small_sources.UNIT_SIZE) -> Job:
    (found,) = find_objects([str(server.url(name))], Reading())
    return Job(object_stat(*found), documents.reader_for(name, "auto"), unit_size)


def local_job(path: Path, unit_size: int = small_sources.UNIT_SIZE) -> Job:
    stat = path.stat()
    return Job(
        FileStat(str(path), stat.st_size, stat.st_mtime_ns, 0), documents.reader_for(path.name, "auto"), unit_size
    )


def units_of(job: Job, found: FileHashes) -> list[tuple[Unit, str]]:
    return [(Unit(job.file.path, job.reader, start, stop), content) for start, stop, content in found.units]


@pytest.mark.parametrize("name", NAMES)
def test_an_object_is_hashed_and_cut_as_the_file_is(server, corpus, name):
    assert hash_input(job_of(server, f"raw/{name}")) == hash_input(local_job(corpus / name))


@pytest.mark.parametrize("unit_size", [small_sources.UNIT_SIZE, 1, 50])
@pytest.mark.parametrize("name", NAMES)
def test_each_unit_reads_as_that_of_the_file(server, corpus, name, unit_size):
    job, reading = job_of(server, f"raw/{name}", unit_size), Reading(record="paragraph")
    of_file = documents.split_into_units(corpus / name, "auto", unit_size)
    pairs = list(zip(units_of(job, hash_input(local_job(corpus / name, unit_size))), of_file, strict=True))
    for (unit, content), wanted in pairs[:: max(1, len(pairs) // 8)]:
        with at_hand(unit, content, job.file) as ours:
            assert list(documents.read(ours, reading)) == list(documents.read(wanted, reading))


@pytest.mark.parametrize("name", ["web/a.jsonl", "code.parquet", "stream.arrow", "file.arrow"])
def test_records_before_a_unit_are_counted_in_the_object(server, corpus, name):
    job = job_of(server, f"raw/{name}")
    units = units_of(job, hash_input(local_job(corpus / name)))
    of_file = documents.split_into_units(corpus / name, "auto", small_sources.UNIT_SIZE)
    assert len(units) > 1
    for (unit, content), wanted in zip(units, of_file, strict=True):
        with at_hand(unit, content, job.file) as ours:
            assert documents.lines_before(ours) == documents.lines_before(wanted)


@pytest.mark.parametrize("name", ["web/c.jsonl.zst", "code.parquet", "stream.arrow", "web/b.jsonl"])
def test_an_object_can_be_read_where_it_lies(server, corpus, name):
    (unit,) = documents.split_into_units(str(server.url(f"raw/{name}")), "auto", 1 << 30)
    (wanted,) = documents.split_into_units(corpus / name, "auto", 1 << 30)
    assert list(documents.read(unit, Reading())) == list(documents.read(wanted, Reading()))


def test_only_the_bytes_of_a_unit_are_fetched(server, corpus, monkeypatch):
    monkeypatch.setattr(objects, "_BUFFER", 512)
    content = (corpus / "web/a.jsonl").read_bytes() * 100
    server.url("long.jsonl").write_bytes(content)
    job = job_of(server, "long.jsonl", 10_000)
    unit, wanted = units_of(job, hash_input(job))[3]
    server.seen.clear()
    with at_hand(unit, wanted, job.file):
        ranges = [each.removeprefix("bytes=").split("-") for method, _, each in server.seen if each]
    to_find_two_lines = 2 << 16
    assert sum(int(last) + 1 - int(first) for first, last in ranges) < to_find_two_lines + 15_000 < len(content)


def test_bits_that_flip_on_the_way_are_read_again(server, corpus):
    wanted = hash_input(local_job(corpus / "code.parquet"))
    job = job_of(server, "raw/code.parquet")
    server.faults = object_store.Faults(flipped=0.1)
    assert hash_input(job) == wanted
    for unit, content in units_of(job, wanted):
        with at_hand(unit, content, job.file) as ours:
            assert hashes.hash_content(ours) == content
    assert server.met["flipped"] > 0


def test_what_was_uploaded_in_parts_is_believed_when_two_readings_agree(server, corpus):
    small_sources.upload_in_parts(server, corpus / "web/a.jsonl", "parts.jsonl")
    job = job_of(server, "parts.jsonl")
    server.faults = object_store.Faults(flipped=0.3)
    assert hash_input(job) == hash_input(local_job(corpus / "web/a.jsonl"))


def test_a_network_that_changes_every_reading_ends_in_one_message(server, corpus):
    job = job_of(server, "raw/web/a.jsonl")
    units = units_of(job, hash_input(local_job(corpus / "web/a.jsonl")))
    server.faults = object_store.Faults(flipped=1)
    with pytest.raises(DataError, match=r"s3://bucket/raw/web/a.jsonl: other bytes came each of 8 times"):
        hash_input(job)
    with pytest.raises(DataError, match=r"a.jsonl: bytes 0 to 700 are not what was hashed.*--rehash"):
        at_hand(*units[0], job.file).__enter__()


def test_an_object_that_was_replaced_is_refused(server, corpus):
    for content in (b'{"text": "longer by some characters"}\n', b"{}\n"):
        server.url("replaced.jsonl").write_bytes(b'{"text": "some words"}\n')
        job = job_of(server, "replaced.jsonl")
        ((unit, wanted),) = units_of(job, hash_input(job))
        server.url("replaced.jsonl").write_bytes(content)
        with (
            pytest.raises(DataError, match=r"replaced.jsonl: changed while it was read"),
            at_hand(unit, wanted, job.file),
        ):
            pass
        with pytest.raises(DataError, match=r"replaced.jsonl: (changed|other bytes)"):
            hash_input(job)


def test_an_object_that_was_removed_is_named(server):
    server.url("removed.jsonl").write_bytes(b'{"text": "some words"}\n')
    job = job_of(server, "removed.jsonl")
    ((unit, wanted),) = units_of(job, hash_input(job))
    server.url("removed.jsonl").unlink()
    with (
        pytest.raises(DataError, match=r"removed.jsonl: cannot be read: no such object"),
        at_hand(unit, wanted, job.file),
    ):
        pass


def test_a_broken_object_is_called_by_its_url(server):
    server.url("broken.parquet").write_bytes(b"PAR1 and nothing more")
    job = job_of(server, "broken.parquet")
    with pytest.raises(DataError, match=r"^s3://bucket/broken.parquet: not a readable Parquet file"):
        hash_input(job)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="a file without a name is found through /proc")
def test_copies_lie_in_the_folder_for_temporary_files_without_a_name(server, temporary):
    with fetching.fetched(job_of(server, "raw/web/a.jsonl").file) as (copy, _):
        assert os.readlink(copy).startswith(str(temporary))
        assert list(temporary.iterdir()) == []


def test_copies_have_a_name_where_they_need_one(server, corpus, temporary, monkeypatch):
    monkeypatch.setattr(fetching.os.path, "isdir", lambda _: False)
    with fetching.fetched(job_of(server, "raw/web/a.jsonl").file) as (copy, _):
        assert [str(path) for path in temporary.iterdir()] == [copy]
        assert Path(copy).read_bytes() == (corpus / "web/a.jsonl").read_bytes()


def test_a_local_unit_is_not_copied(corpus):
    (unit,) = documents.split_into_units(corpus / "notes.txt", "auto", 1 << 30)
    with at_hand(unit, "", FileStat("", 0, 0, 0)) as ours:
        assert ours is unit


def test_a_store_that_fails_for_good_is_one_message(server, monkeypatch):
    job = job_of(server, "raw/web/a.jsonl")
    monkeypatch.setattr(objects, "PATIENCE", 0.2)
    server.faults = object_store.Faults(error=1)
    with pytest.raises(StoreError, match=r"raw/web/a.jsonl: no right answer for .*503"):
        hash_input(job)


def test_a_full_disk_is_no_fault_of_the_object(server, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    job = job_of(server, "raw/web/a.jsonl")
    monkeypatch.setattr(fetching, "memoryview", full, raising=False)
    with pytest.raises(OSError, match="No space left") as error:
        hash_input(job)
    assert error.value.filename == tempfile.gettempdir()
