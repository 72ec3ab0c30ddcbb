"""Which objects a URL means: those that the same pattern means below a folder."""

from pathlib import Path

import object_store
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep.documents import Reading, find_files, find_objects
from llmt_prep.documents.listing import _is_match
from llmt_shared.errors import ConfigError

NAMES = ["a.jsonl", "b.jsonl.zst", "README.md", "x.dat", "deep/c.jsonl", "deep/er/d.parquet", "deep/er/e[1].jsonl",
         ".hidden/f.jsonl", "deep/.g.jsonl", "odd name/é #1.jsonl"]  # fmt: skip


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "raw"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture(scope="module")
def server(server: object_store.Server, raw: Path) -> object_store.Server:
    object_store.upload(server, raw, "raw")
    server.url("raw/marker").write_bytes(b"")  # of a "folder"
    server.url("raw/marker/h.jsonl").write_bytes(b"{}\n")
    server.url("rawer/i.jsonl").write_bytes(b"{}\n")
    return server


def found(*patterns: str, reading: Reading | None = None) -> list[str]:
    urls = [f"s3://bucket/{pattern}" for pattern in patterns]
    return [each.path.key for each in find_objects(urls, reading or Reading())]


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    "pattern",
    ["raw", "raw/*.jsonl", "raw/**/*.jsonl", "raw/**", "raw/*/*", "raw/*/**/*.jsonl", "raw/deep/er/e[1].jsonl",
     "raw/.hidden/*.jsonl", "raw/.*/*", "raw/[ab].*", "raw/?.jsonl", "raw/[!a]*.*", "raw/odd name/*",
     "raw/d*/**/[de]*"],
)  # fmt: skip
def test_a_pattern_means_what_it_means_on_a_disk(raw, pattern):
    reading = Reading(reader="jsonl" if "*" in pattern or "[" in pattern else "auto")
    on_disk = [path.relative_to(raw.parent).as_posix() for path in find_files([str(raw.parent / pattern)], reading)]
    in_store = [key for key in found(pattern, reading=reading) if not key.startswith("raw/marker")]
    assert in_store == sorted(on_disk)
    assert in_store


@given(st.lists(st.sampled_from(["**", "*", "a", ".a", "?", "[ab]", ".*"]), min_size=1, max_size=4),
       st.lists(st.sampled_from(["a", "b", "ab", ".a"]), min_size=1, max_size=4))  # fmt: skip
def test_a_glob_matches_as_the_module_glob_does(tmp_path_factory, parts, names):
    import glob

    folder = tmp_path_factory.mktemp("glob")
    path = folder.joinpath(*names)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    matches = {Path(each) for each in glob.glob(str(folder.joinpath(*parts)), recursive=True)}
    assert _is_match(names, parts) == (path in matches)


@pytest.mark.usefixtures("server")
def test_an_object_that_several_patterns_mean_comes_once():
    assert found("raw/a.jsonl", "raw/*.jsonl", "raw/deep/c.jsonl") == ["raw/a.jsonl", "raw/deep/c.jsonl"]


@pytest.mark.usefixtures("server")
def test_what_stands_for_a_folder_is_no_object():
    assert found("raw/*ar*/*", "raw/**/h.*") == ["raw/marker/h.jsonl"]
    with pytest.raises(ConfigError, match="matches no file"):
        found("raw/mark*")


def test_sizes_come_with_the_listing(server, raw):
    server.seen.clear()
    (each,) = find_objects(["s3://bucket/raw/deep/*.jsonl"], Reading())
    assert each.stat.st_size == (raw / "deep/c.jsonl").stat().st_size
    assert [method for method, path, _ in server.seen if path.endswith("c.jsonl")] == []


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://bucket/raw/*.parquet", r"s3://bucket/raw/\*.parquet: matches no file; mend `path:`"),
        ("s3://bucket/no/such", "s3://bucket/no/such: no such file or folder; mend `path:`"),
        ("s3://no-such-bucket/raw", "s3://no-such-bucket/raw: no such bucket; mend `path:`"),
        ("s3://no-such-bucket/raw/*", "s3://no-such-bucket/raw: no such bucket; mend `path:`"),
        ("s3://bucket/raw/x.dat", "does not say how to read it"),
        ("http://127.0.0.1:9/raw/*.jsonl", "a web server does not list its files"),
        ("http://127.0.0.1:9/raw/**", "a web server does not list its files"),
    ],
)
def test_a_url_that_means_nothing_is_named(url, said):
    with pytest.raises(ConfigError, match=said):
        find_objects([url], Reading())


def test_a_folder_without_known_suffixes_asks_for_a_glob(server):
    server.url("other/x.dat").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"no file below this folder ends in .*glob, such as s3://bucket/other/\*\*"):
        found("other")


def test_a_saved_dataset_is_asked_for_by_its_files(server):
    for name in ("state.json", "data-00000-of-00001.arrow", "cache-1.arrow"):
        server.url(f"saved/{name}").write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"that `datasets` saved .*saved/data-\*.arrow"):
        found("saved")


def test_chats_are_not_read_from_text(server):
    with pytest.raises(ConfigError, match="text, and chats are read from"):
        found("raw/README.md", reading=Reading(text_field=None))
    assert "raw/README.md" not in found("raw", reading=Reading(text_field=None))


@pytest.mark.parametrize("name", ["raw/a.jsonl", "raw/*.jsonl", "raw"])
def test_wrong_credentials_are_one_message(server, name):
    server.faults = object_store.Faults(refused=1)
    try:
        with pytest.raises(ConfigError, match=r"s3://bucket/raw.*: the store refuses access: .*AWS_ACCESS_KEY_ID"):
            found(name)
    finally:
        server.faults = object_store.Faults()


@pytest.mark.usefixtures("server")
def test_a_whole_bucket_is_a_folder():
    assert "rawer/i.jsonl" in [each.path.key for each in find_objects(["s3://bucket/*/*"], Reading(reader="jsonl"))]
    with pytest.raises(ConfigError, match=r"s3://bucket: (no file below this folder ends in|holds a dataset)"):
        find_objects(["s3://bucket"], Reading(reader="parquet", text_field=None))
