"""Whose the cache is, and that it is not pruned while a run uses it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmt_prep import cache as caches
from llmt_prep.cache import being_pruned, being_read, check_is_cache, in_use, is_cache, origin_of, unit_folders
from llmt_shared.errors import ConfigError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    with in_use(tmp_path / "cache"):
        pass
    return tmp_path / "cache"


def test_a_cache_carries_the_tag_that_backup_tools_know(cache):
    assert (cache / "CACHEDIR.TAG").read_bytes()[:43] == b"Signature: 8a477f597d28d172789f06886806bc55"
    check_is_cache(cache)


def test_a_folder_that_holds_other_things_is_not_marked(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"holds 'thesis\.tex', which is not of llmt-prep"), in_use(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_cache_without_a_tag_is_marked_when_it_is_used(tmp_path):
    for name in ("units", "tokenizers"):
        (tmp_path / name).mkdir()
    assert not is_cache(tmp_path)
    with in_use(tmp_path):
        assert is_cache(tmp_path)


@pytest.mark.parametrize(
    "tag", [None, "", "Signature: 8a477f597d28d172789f06886806bc55\n# of another program\n", b"\xff"]
)
def test_another_folder_is_no_cache(tmp_path, tag):
    if tag is not None:
        (tmp_path / "CACHEDIR.TAG").write_bytes(tag if isinstance(tag, bytes) else tag.encode())
    with pytest.raises(ConfigError, match="no cache of llmt-prep"):
        check_is_cache(tmp_path)


def test_two_runs_share_a_cache(cache):
    with in_use(cache), in_use(cache), being_read(cache):
        pass


def test_a_cache_in_use_is_not_pruned_and_the_holder_is_named(cache):
    with in_use(cache), pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on "), being_pruned(cache):
        pass
    with being_pruned(cache):
        pass


def test_a_cache_that_is_only_read_is_not_pruned(cache):
    (cache / "lock").write_text("")
    with being_read(cache), pytest.raises(ConfigError, match="in use by a run that only reads it"), being_pruned(cache):
        pass


def test_runs_that_have_ended_are_not_named(cache):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with in_use(cache):
        lock = cache / "lock"
        line = lock.read_text().splitlines()[-1] + "\n"
        lock.write_text(line.replace(f"process {os.getpid()} ", f"process {ended.pid} ") + line)
        with pytest.raises(ConfigError) as error, being_pruned(cache):
            pass
    assert f"process {ended.pid} " not in str(error.value)
    assert str(error.value).count("process") == 1


def test_a_run_waits_until_the_cache_is_pruned(cache, monkeypatch):
    entered, waits = threading.Event(), threading.Event()
    monkeypatch.setattr(caches, "say", lambda message: waits.set() if f"process {os.getpid()} on" in message else None)

    def use() -> None:
        with in_use(cache):
            entered.set()

    thread = threading.Thread(target=use)
    with being_pruned(cache):
        thread.start()
        assert waits.wait(timeout=60)
        assert not entered.is_set()
    assert entered.wait(timeout=60)
    thread.join()


def test_reading_a_cache_that_is_not_there_makes_none(tmp_path):
    with being_read(tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()


def test_the_names_of_killed_runs_do_not_pile_up(cache, monkeypatch):
    monkeypatch.setattr(caches, "_LOCK_BYTES", 200)
    for _ in range(20):
        with in_use(cache):
            pass
    assert (cache / "lock").stat().st_size < 300


def test_only_folders_with_the_name_of_a_key_are_units(cache):
    for name in ("ab/" + "ab" * 32, "ab/." + "ab" * 32 + ".host.1.tmp", "ab/notes", "other/" + "ab" * 32):
        (cache / "units" / name).mkdir(parents=True)
    assert [folder.name for folder in unit_folders(cache)] == ["ab" * 32]


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"facts": {}, "file": "", "file_sha256": "", "unit_size": 1}']
)
def test_a_unit_that_does_not_say_what_it_is_made_of_has_no_origin(tmp_path, content):
    if content is not None:
        (tmp_path / "origin.json").write_text(content)
    assert origin_of(tmp_path) is None


def test_a_unit_whose_origin_is_garbage_has_none(tmp_path):
    (tmp_path / "origin.json").write_text(
        '{"facts": null, "file": "a", "file_sha256": "b", "unit_size": 1, "tokenizer": "t"}'
    )
    assert origin_of(tmp_path) is None


def test_a_cache_made_for_a_run_that_fails_at_once_is_removed(tmp_path):
    with pytest.raises(ConfigError), in_use(tmp_path / "cache"):
        raise ConfigError("no such file")
    assert not (tmp_path / "cache").exists()
