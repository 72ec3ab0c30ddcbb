"""The manifest: every file with the sha256 that it has, though most were never read again."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from llmt_prep import finish
from llmt_prep.config import MixConfig
from llmt_prep.pipeline import build_dataset
from llmt_shared.manifest import NAME


def test_the_manifest_has_the_hash_and_size_of_every_file(mix: dict[str, Any]) -> None:
    built = build_dataset(MixConfig.model_validate(mix | {"shard_size": 20_000}), workers=1)
    listed = {entry.path: (entry.bytes, entry.sha256) for entry in built.manifest.files}
    files = [path for path in built.path.rglob("*") if path.is_file() and path.name not in (NAME, finish.RUN_REPORT)]
    found = {
        path.relative_to(built.path).as_posix(): (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    }
    assert listed == found
    assert list(listed) == sorted(listed)
    assert "train/tokens/c/3/0" in listed


def test_large_files_are_not_read_again(mix: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def hash_file(path: str) -> str:
        read.append(path)
        return "0" * 64

    monkeypatch.setattr(finish, "hash_file", hash_file)
    build_dataset(MixConfig.model_validate(mix), workers=1)
    assert read
    assert not [path for path in read if "/c/" in path]


def test_a_file_that_was_written_and_is_gone_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="is gone"):
        finish.write_manifest(tmp_path, {}, {tmp_path / "tokens": "0" * 64})
