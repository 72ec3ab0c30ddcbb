"""The manifest: read strictly, never pointing outside its directory, compared with the disk by name and size."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llmt_shared.errors import FormatError
from llmt_shared.manifest import FileEntry, Manifest, read_manifest, wrong_files

CONTENT = {
    "format": 1, "kind": "pretrain", "length": 8, "sources": ["web"], "recipe": "none",
    "tokenizer": {"digest": "none", "vocab_size": 4, "max_id": 3, "bos_id": None, "eos_id": 3, "pad_id": None},
    "splits": {"train": {"rows": 1, "segments": 1, "tokens": 8, "targets": 7}},
    "files": [{"path": "train/a", "bytes": 3, "sha256": "0"}, {"path": "b", "bytes": 0, "sha256": "0"}],
}  # fmt: skip


def write(directory: Path, **changes: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "MANIFEST.json").write_text(json.dumps(CONTENT | changes))
    return directory


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    return write(tmp_path)


def test_the_digest_is_the_sha256_of_the_file(whole):
    manifest, digest = read_manifest(whole)
    assert manifest.splits["train"].targets == 7
    assert digest == hashlib.sha256((whole / "MANIFEST.json").read_bytes()).hexdigest()


def test_a_whole_directory_has_no_wrong_files(whole):
    assert wrong_files(whole, read_manifest(whole)[0]) == []


@pytest.mark.parametrize(("content", "kind"), [(b"ab", "truncated: 2 bytes"), (b"abcd", "oversized: 4 bytes")])
def test_a_file_of_another_size_is_named_with_both_sizes(whole, content, kind):
    (whole / "train" / "a").write_bytes(content)
    assert wrong_files(whole, read_manifest(whole)[0]) == [f"{whole}/train/a: {kind}; the manifest says 3"]


def test_a_missing_file_is_named(whole):
    (whole / "b").unlink()
    assert wrong_files(whole, read_manifest(whole)[0]) == [f"{whole}/b: missing; the manifest lists it with 0 bytes"]


def test_a_file_where_a_folder_was_is_missing(whole):
    (whole / "train" / "a").unlink()
    (whole / "train").rmdir()
    (whole / "train").write_text("no folder")
    assert len(wrong_files(whole, read_manifest(whole)[0])) == 1


def test_a_size_below_zero_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        FileEntry(path="a", bytes=-1, sha256="0" * 64)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "train/../../x", "..", "a\\..\\x", "", ".", "a\0b"])
def test_a_path_that_leaves_the_directory_is_refused(path):
    with pytest.raises(ValidationError, match="leaves the dataset's directory"):
        FileEntry(path=path, bytes=1, sha256="0")


@given(st.text(st.sampled_from("ab./\\"), max_size=8))
def test_no_accepted_path_leaves_the_directory(path):
    try:
        entry = FileEntry(path=path, bytes=1, sha256="0")
    except ValidationError:
        return
    root = Path("/some/where")
    assert root in Path(f"/some/where/{entry.path}").resolve().parents


def test_a_directory_without_manifest_says_how_to_get_one(tmp_path):
    with pytest.raises(FormatError, match="no finished dataset"):
        read_manifest(tmp_path)


def test_an_unfinished_dataset_says_how_to_finish_it(tmp_path):
    (tmp_path / "data.staging").mkdir()  # the dataset itself appears when it is finished
    with pytest.raises(FormatError, match="unfinished; run the same"):
        read_manifest(tmp_path / "data")


def test_a_directory_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FormatError, match="no such dataset"):
        read_manifest(tmp_path / "data")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format: "),
        ({"kind": "dance"}, "kind: "),
        ({"length": "8x"}, "length: "),
        ({"splits": {"train": {"rows": 1}}}, r"splits\.train\.segments: "),
        ({"splits": {}}, "splits: .*wanted train"),
        ({"splits": CONTENT["splits"] | {"../x": CONTENT["splits"]["train"]}}, "splits: .*wanted train"),
        ({"more": 1}, "more: "),
        ({"files": [{"path": "../x", "bytes": 1, "sha256": "0"}]}, r"files\.0\.path: "),
    ],
)
def test_another_format_is_refused_with_the_key(tmp_path, changes, message):
    with pytest.raises(FormatError, match=message):
        read_manifest(write(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1}'])
def test_a_broken_manifest_is_refused(tmp_path, content):
    (tmp_path / "MANIFEST.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"MANIFEST\.json: "):
        read_manifest(tmp_path)


def test_a_manifest_survives_writing_and_reading():
    manifest = Manifest.model_validate(CONTENT)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
