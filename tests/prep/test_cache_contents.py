"""Listing and pruning: what goes is what was asked for, least recently used first, and nothing that is in use."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep.cache import cache_of, in_use, unit_folders
from llmt_prep.cache_contents import (
    StoredUnit,
    cache_contents,
    choose,
    parse_age,
    parse_size,
    prune,
    render_contents,
    render_pruned,
)
from llmt_prep.config import MixConfig
from llmt_prep.executor import HERE
from llmt_prep.guard import distrust, inexact_engines
from llmt_prep.ingest import tokenize_inputs
from llmt_prep.inputs import find_inputs
from llmt_prep.pipeline import build_dataset, units_of
from llmt_prep.store import is_sound
from llmt_prep.tokenizer import load_tokenizer
from llmt_shared.errors import ConfigError

DAY = 86_400


def config(mix: dict[str, Any], **change: Any) -> MixConfig:
    return MixConfig.model_validate(mix | change)


@pytest.fixture
def cache(mix: dict[str, Any]) -> Path:
    """The cache of a mix: two units of `help`, one of `more`, ten of `plain`."""
    fill(config(mix))
    return cache_of(config(mix))


def fill(mix: MixConfig) -> None:
    cache = cache_of(mix)
    with in_use(cache):
        inputs = find_inputs(mix, cache, HERE, rehash=False, remember=True)
        tokenize_inputs(mix, inputs, load_tokenizer(mix.tokenizer.path), cache, HERE)


def total(cache: Path) -> int:
    return sum(path.stat().st_size for path in (cache / "units").rglob("*") if path.is_file())


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 100)), max_size=12),
    st.one_of(st.none(), st.integers(0, 100)),
    st.one_of(st.none(), st.integers(0, 400)),
    st.one_of(st.none(), st.sets(st.integers(0, 11).map(str))),
)
def test_what_goes_is_old_or_unwanted_or_the_least_recently_used(sizes_and_times, older_than, max_bytes, wanted):
    units = [StoredUnit(Path(str(i)), size, used) for i, (size, used) in enumerate(sizes_and_times)]
    doomed = choose(units, 100, older_than, max_bytes, wanted)
    kept = set(units) - set(doomed)
    assert len(set(doomed)) == len(doomed)
    assert all(older_than is None or 100 - unit.used <= older_than for unit in kept)
    assert all(wanted is None or unit.path.name in wanted for unit in kept)
    assert max_bytes is None or sum(unit.bytes for unit in kept) <= max_bytes
    for_size = [
        unit
        for unit in doomed
        if (older_than is None or 100 - unit.used <= older_than) and (wanted is None or unit.path.name in wanted)
    ]
    if for_size:
        assert max(unit.used for unit in for_size) <= min((unit.used for unit in kept), default=100)
        assert sum(unit.bytes for unit in {*kept, for_size[-1]}) > (max_bytes or 0)


def test_contents_are_counted_and_measured(cache, mix):
    contents = cache_contents(cache)
    assert (contents.units, contents.bytes, contents.leftovers) == (13, total(cache), 0)
    (tokenizer,) = contents.tokenizers
    assert tokenizer.name.startswith(f"{mix['tokenizer']} (digest ")
    assert {Path(part.name).name: part.units for part in contents.files}.keys() >= {"a.jsonl", "more.jsonl.gz", "3.txt"}
    assert [(part.name, part.units) for part in contents.ages] == [("last day", 13)]
    for parts in (contents.tokenizers, contents.files, contents.ages):
        assert (sum(part.units for part in parts), sum(part.bytes for part in parts)) == (13, contents.bytes)


def test_contents_are_shown(cache):
    shown = render_contents(cache_contents(cache))
    assert shown.startswith(f"{cache}: 13 units, ")
    assert "more.jsonl.gz" in shown
    assert "last day" in shown


def test_units_are_listed_by_the_time_of_their_last_use(cache):
    for folder, days in zip(unit_folders(cache), (0, 3, 3, 20, 50, 200), strict=False):
        os.utime(folder, (time.time() - days * DAY,) * 2)
    ages = [(part.name, part.units) for part in cache_contents(cache).ages]
    assert ages == [("last day", 8), ("last 7 days", 2), ("last 30 days", 1), ("last 90 days", 1), ("time before", 1)]


def test_old_units_go_and_others_stay_sound(cache):
    old = list(unit_folders(cache))[:3]
    for folder in old:
        os.utime(folder, (time.time() - 31 * DAY,) * 2)
    pruned = prune(cache, older_than=parse_age("30d"))
    assert (pruned.removed_units, pruned.kept_units, pruned.kept_bytes) == (3, 10, total(cache))
    assert all(is_sound(folder) for folder in unit_folders(cache))
    assert not any(folder.exists() for folder in old)


def test_a_unit_that_is_reused_counts_as_used(cache, mix):
    for folder in unit_folders(cache):
        os.utime(folder, (0, 0))
    mix["sources"].pop("plain")
    fill(config(mix))
    assert prune(cache, older_than=DAY).kept_units == 3


def test_a_dry_run_removes_nothing_and_says_the_same(cache):
    before = sorted(cache.rglob("*"))
    would = prune(cache, max_bytes=0, dry_run=True)
    assert sorted(cache.rglob("*")) == before
    did = prune(cache, max_bytes=0)
    assert did == would.model_copy(update={"dry_run": False})
    assert "would remove 13 units" in render_pruned(would)
    assert "removed 13 units" in render_pruned(did)
    assert list(unit_folders(cache)) == []


def test_what_a_mix_does_not_use_goes(cache, mix):
    wanted = units_of(config(mix, sources={"help": mix["sources"]["help"]}), workers=1)
    prune(cache, wanted=wanted)
    assert {folder.name for folder in unit_folders(cache)} == wanted
    assert len(wanted) == 2


def test_tokenizers_go_with_their_last_unit(cache):
    assert prune(cache).tokenizers == 0
    assert prune(cache, max_bytes=0).tokenizers == 1
    assert list((cache / "tokenizers").iterdir()) == []


def test_packing_after_pruning_gives_the_same_dataset(cache, mix):
    prune(cache, max_bytes=total(cache) // 2)
    built = build_dataset(config(mix), workers=1)
    assert built.digest == build_dataset(config(mix, cache=f"{cache}2", output=mix["output"] + "2"), workers=1).digest


def test_what_dead_processes_left_goes_anywhere_in_the_cache(cache):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, key = socket.gethostname(), "ab" * 32
    group = cache / "units" / "ab"
    names = {
        "dead": f".{key}.{host}.{dead.pid}.tmp",
        "alive": f".{key}.{host}.{os.getppid()}.tmp",
        "elsewhere": f".{key}.another.host.1.tmp",
        "elsewhere, long ago": f".{key}.another.host.2.tmp",
    }
    for name in names.values():
        (group / name).mkdir(parents=True)
        (group / name / "tokens").touch()
    os.utime(group / names["elsewhere, long ago"], (0, 0))
    (cache / "hashes.1.tmp").touch()
    assert cache_contents(cache).leftovers == 3
    assert prune(cache).leftovers == 3
    assert {path.name for path in group.glob(".*")} == {names["alive"], names["elsewhere"]}
    assert not (cache / "hashes.1.tmp").exists()


def test_a_cache_in_use_is_left_alone(cache):
    with in_use(cache), pytest.raises(ConfigError, match="in use by process"):
        prune(cache, max_bytes=0)
    assert len(list(unit_folders(cache))) == 13


@pytest.mark.parametrize("command", [cache_contents, prune])
def test_a_folder_that_is_no_cache_is_refused(tmp_path, command):
    with pytest.raises(ConfigError, match="no cache of llmt-prep"):
        command(tmp_path)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90m", 5400), ("12h", 43_200), ("30d", 30 * DAY), (" 1.5 w", 10.5 * DAY)]
)
def test_ages_are_read(text, seconds):
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1y", "1d2h"])
def test_what_is_no_age_is_refused(text):
    with pytest.raises(ConfigError, match="wanted minutes, hours, days or weeks"):
        parse_age(text)


def test_what_is_no_size_is_refused():
    assert parse_size("200GB") == 200 * 10**9
    with pytest.raises(ConfigError, match="--max-size: found '200XB'; wanted a size"):
        parse_size("200XB")


def test_pruning_everything_does_not_forget_an_engine_found_inexact(cache: Path) -> None:
    (folder,) = (cache / "tokenizers").iterdir()
    distrust(folder, "fastokens 0")
    assert prune(cache, max_bytes=0).kept_units == 0
    assert inexact_engines(folder) == {"fastokens 0"}
