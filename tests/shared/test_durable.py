"""Files that are whole or absent, also where several machines write to one file system."""

import os
import socket
from pathlib import Path

import pytest

from llmt_shared import durable


def test_processes_of_two_hosts_with_one_number_write_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    names = set()
    for host in ("one", "two"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        with durable.writing(path):
            names |= {each.name for each in tmp_path.glob("*.tmp")}
    assert names == {f"file.{host}.{os.getpid()}.tmp" for host in ("one", "two")}


def test_a_file_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    def interrupt() -> None:
        with durable.writing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    path = tmp_path / "new" / "file"
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert list(path.parent.iterdir()) == []
    durable.write(path, "whole")
    assert path.read_bytes() == b"whole"


def test_a_writer_whose_temporary_file_was_removed_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"of the task that was done again")
    with pytest.raises(FileNotFoundError), durable.writing(path):
        durable.temporary_name(path).unlink()
    assert path.read_bytes() == b"of the task that was done again"
