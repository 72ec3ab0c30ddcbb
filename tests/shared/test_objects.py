"""Objects by URL: what is written is read back, in spite of a store and a network that fail now and then."""

import io
from pathlib import Path

import numpy as np
import object_store
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmt_shared import objects
from llmt_shared.errors import ConfigError, StoreError
from llmt_shared.objects import ObjectPath, location_of

pytestmark = pytest.mark.usefixtures("without_faults")

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(scope="module")
def server(server: object_store.Server) -> object_store.Server:
    server.url("some/object.bin").write_bytes(CONTENT)
    return server


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PIECE", 40_000)


@pytest.mark.parametrize("key", ["plain.txt", "with space/é#1.txt", "a%20b.jsonl", "deep/er/x=1/part-0.parquet"])
def test_what_is_written_is_read_under_any_name(server, key):
    path = server.url(key)
    path.write_bytes(b"content")
    assert (path.read_bytes(), path.stat().st_size, path.name) == (b"content", 7, key.rpartition("/")[2])


def test_a_long_object_is_read_in_pieces_and_in_order(server):
    assert b"".join(server.url("some/object.bin").pieces(len(CONTENT))) == CONTENT


@given(start=st.integers(0, len(CONTENT)), count=st.integers(0, 5000))
def test_any_range_is_that_part_of_the_object(server, start, count):
    stop = min(start + count, len(CONTENT))
    assert server.url("some/object.bin").read_range(start, stop) == CONTENT[start:stop]


def test_an_opened_object_reads_as_a_file_does(server):
    with server.url("some/object.bin").open() as file:
        file.seek(-10, io.SEEK_END)
        assert file.read() == CONTENT[-10:]
        file.seek(100)
        assert (file.read(7), file.tell()) == (CONTENT[100:107], 107)


def test_a_file_is_uploaded_as_it_is(server, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    server.url("uploaded").upload(tmp_path / "file")
    assert server.url("uploaded").read_bytes() == CONTENT


def test_a_listing_has_what_lies_below_and_nothing_beside(server):
    for key in ("list/b/2", "list/a", "list/b/1", "listed"):
        server.url(key).write_bytes(key.encode())
    found = [(str(each.path), each.stat.st_size) for each in server.url("list").files()]
    assert found == [(f"s3://bucket/list/{name}", len(f"list/{name}")) for name in ("a", "b/1", "b/2")]


def test_a_new_object_does_not_replace_an_older_one(server):
    server.url("new").write_bytes(b"first", is_new=True)
    with pytest.raises(FileExistsError):
        server.url("new").write_bytes(b"second", is_new=True)
    assert server.url("new").read_bytes() == b"first"


def test_a_removed_object_is_gone_and_may_be_removed_again(server):
    path = server.url("removed")
    path.write_bytes(b"x")
    path.unlink()
    path.unlink()
    assert not path.exists()


@pytest.mark.parametrize("url", ["s3://bucket/nothing", "s3://no-such-bucket/x"])
def test_what_is_not_there_is_said_as_of_a_file(server, url):
    with pytest.raises(FileNotFoundError, match=r"no such (object|bucket): 's3:"):
        ObjectPath(url).read_bytes()


def test_faults_that_pass_change_nothing(server):
    server.faults = object_store.Faults(error=0.1, truncated=0.1, stalled=0.05, stall=0.1)
    for _ in range(4):
        assert server.url("some/object.bin").read_bytes() == CONTENT
    assert min(server.met[name] for name in ("error", "truncated", "stalled")) > 0


def test_faults_that_stay_end_in_one_message(server, monkeypatch):
    monkeypatch.setattr(objects, "PATIENCE", 0.3)
    server.faults = object_store.Faults(error=1)
    with pytest.raises(
        StoreError, match=r"s3://bucket/some/object.bin: no right answer for .*503.*run the same command"
    ):
        server.url("some/object.bin").read_bytes()


def test_missing_credentials_are_named(monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "alone")
    objects._store.cache_clear()
    with pytest.raises(ConfigError, match=r"s3://elsewhere/x: the store cannot be opened: .*AWS_SECRET_ACCESS_KEY"):
        ObjectPath("s3://elsewhere/x").stat()


@pytest.mark.parametrize("text", ["data/pt8k", "/data/pt8k", "file:///data/pt8k", "a:b"])
def test_a_path_is_a_path(text):
    assert location_of(text) == Path(text.removeprefix("file://"))


@pytest.mark.parametrize(
    ("text", "wanted"), [("s3://b/k/", "s3://b/k"), ("S3://b/k", "s3://b/k"), ("https://h:80/x", "https://h:80/x")]
)
def test_a_url_is_an_object(text, wanted):
    assert location_of(text) == ObjectPath(wanted)


@pytest.mark.parametrize("text", ["https://me:secret@host/x", "s3://AKIA:secret@bucket/k"])
def test_a_password_in_a_url_is_refused_and_not_repeated(text):
    """A URL is part of messages and configs that are saved."""
    with pytest.raises(ValueError, match=r"wanted no password in a URL; set .* in the environment") as error:
        location_of(text)
    assert "secret" not in str(error.value)


def test_an_azure_container_before_its_account_is_no_password():
    assert location_of("abfss://box@account.dfs.core.windows.net/x") == ObjectPath(
        "abfss://box@account.dfs.core.windows.net/x"
    )


@pytest.mark.parametrize(("text", "said"), [("s5://b/k", "wanted a path, or a URL"), ("s3:///k", "wanted s3://BUCKET")])
def test_a_url_of_no_store_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        location_of(text)
