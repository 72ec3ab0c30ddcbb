"""Which files a mix reads, and which it must not."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from llmt_prep.config import MixConfig
from llmt_prep.documents import Reading, find_files
from llmt_prep.executor import HERE
from llmt_prep.inputs import HASHES, find_inputs
from llmt_shared.errors import ConfigError


def find(mix: dict[str, Any], cache: Path, path: object) -> list[str]:
    config = MixConfig.model_validate(mix | {"sources": {"a": {"path": str(path)}}})
    found = find_inputs(config, cache, HERE, rehash=False, remember=True)
    return [os.path.relpath(file.path, cache.parent) for file in found.files]


def test_a_broken_memory_of_hashes_costs_only_hashing(mix: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "cache").mkdir()
    for content in ("[]", "null", "{", ""):
        (tmp_path / "cache" / HASHES).write_text(content)
        assert find(mix, tmp_path / "cache", tmp_path / "a.jsonl") == ["a.jsonl"]


def test_a_pipe_is_refused(mix: dict[str, Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="is a pipe or device"):
        find(mix, tmp_path / "cache", tmp_path / "a.jsonl")


def test_a_dead_link_is_named(mix: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"a\.jsonl: cannot be read"):
        find(mix, tmp_path / "cache", tmp_path)


def test_a_name_that_is_not_utf8_is_refused_at_once(mix: dict[str, Any], tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.jsonl"
    Path(os.fsdecode(name)).touch()
    with pytest.raises(ConfigError, match="not UTF-8; rename"):
        find(mix, tmp_path / "cache", tmp_path)


@pytest.mark.parametrize("name", ["out/data/quarantine.jsonl", "out/data.staging/data/quarantine.jsonl", "cache/a.txt"])
def test_what_packing_wrote_is_no_input(mix: dict[str, Any], tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="is packing's own"):
        find(mix, tmp_path / "cache", tmp_path)


def test_the_bytes_of_a_parquet_file_are_shared_among_its_units(mix: dict[str, Any], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"document {i}" for i in range(100)]}), path, row_group_size=15)
    config = MixConfig.model_validate(mix | {"sources": {"a": {"path": str(path)}}, "unit_size": 1})
    units = find_inputs(config, tmp_path / "cache", HERE, rehash=False, remember=False).units
    assert len(units) == 7
    borders = [0, *(unit.span[1] for unit in units)]
    assert [unit.span[0] for unit in units] == borders[:-1]
    assert borders[-1] == path.stat().st_size
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("pattern", ["raw", "raw/**/*.jsonl", "raw/*/a.jsonl"])
def test_a_folder_that_cannot_be_read_is_not_left_out_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    for name in ("ok", "locked"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        (tmp_path / "raw" / name / "a.jsonl").write_text('{"text": "a"}\n')
    scandir = os.scandir

    def refusing(path: Any = ".") -> Any:  # as for a user who is not root
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ConfigError, match=r"locked: cannot be read: Permission denied; .*leave it out of `path:`"):
        find_files([str(tmp_path / pattern)], Reading())
