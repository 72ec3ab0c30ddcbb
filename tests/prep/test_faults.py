"""Faults: each ends in one clear message and leaves what the same command goes on with to the same dataset."""

import builtins
import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from benchmarks import kills
from ruamel.yaml import YAML

from llmt_prep.config import MixConfig
from llmt_prep.pipeline import Built, build_dataset, dry_run
from llmt_prep.stopping import stoppable
from llmt_shared.errors import ConfigError, DataError, Stopped


def build(mix: dict[str, Any], **more: Any) -> Built:
    """Pack in this process, as the command does."""
    with stoppable():
        return build_dataset(MixConfig.model_validate(mix), **{"workers": 1, **more})


def reference_of(mix: dict[str, Any]) -> str:
    """Digest of a mix, from a run of its own."""
    return build(mix | {"output": str(Path(mix["output"]).parent.with_name("reference") / "data")}).digest


@pytest.fixture(scope="module")
def digests() -> list[str]:
    return []


@pytest.fixture
def reference(mix: dict[str, Any], digests: list[str]) -> str:
    """Digest of the mix, made once."""
    if not digests:
        digests.append(reference_of(mix))
    return digests[0]


def alone(mix: dict[str, Any], path: Path) -> dict[str, Any]:
    """The mix with one file only."""
    return mix | {"sources": {"alone": {"path": str(path)}}}


def leftovers(mix: dict[str, Any]) -> list[str]:
    """What lies beside an output and is neither it nor its cache."""
    folder = Path(mix["output"]).parent
    return sorted(path.name for path in folder.iterdir() if path.name not in ("data", "data2", ".llmt-cache"))


class Watched(io.FileIO):
    """A file that calls a function before a read from the middle on."""

    def __init__(self, path: Any, before_read: Callable[[], None]) -> None:
        super().__init__(path)
        self._before_read = before_read

    def readinto(self, buffer: Any) -> int | None:
        if self.tell() >= os.fstat(self.fileno()).st_size // 2:
            self._before_read()
        view = memoryview(buffer)[: max(1, os.fstat(self.fileno()).st_size // 4)]
        return super().readinto(view)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(1 << 16), b""))

    def read(self, size: int | None = -1) -> bytes:
        buffer = bytearray(1 << 16 if size is None or size < 0 else size)
        return bytes(buffer[: self.readinto(buffer)])


def openings(mix: dict[str, Any], path: Path) -> int:
    """How often a run opens a file that it has never seen."""
    with watching(path, lambda: None, opening=1) as opened:
        dry_run(MixConfig.model_validate(mix), workers=1)
    return opened[0]


@contextmanager
def watching(path: Path, before_read: Callable[[], None], opening: int) -> Iterator[list[int]]:
    """Call a function in the middle of each reading of a file, from one opening on; gives the number of openings."""
    really, opened = builtins.open, [0]

    def open_(name: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "b" in mode and "w" not in mode and not isinstance(name, int) and os.fspath(name) == str(path):
            opened[0] += 1
            if opened[0] >= opening:
                return io.BufferedReader(Watched(name, before_read), 512)
        return really(name, mode, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", open_)
        patch.setattr(io, "open", open_)
        yield opened


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("name", ["help/a.jsonl", "more.jsonl.gz", "plain/3.txt"])
def test_a_read_error_names_the_file_and_goes_on_when_it_is_mended(
    mix: dict[str, Any], corpus_dir: Path, tmp_path: Path, name: str
) -> None:
    mix = alone(mix, corpus_dir / name)
    reference = reference_of(mix)
    for opening in range(1, openings(mix, corpus_dir / name) + 1):
        output = tmp_path / str(opening) / "data"
        with watching(corpus_dir / name, fail, opening), pytest.raises(DataError, match="cannot be read") as error:
            build(mix | {"output": str(output)})
        assert f"{corpus_dir / name}: cannot be read: Input/output error" in str(error.value)
        assert not output.exists()
        assert build(mix | {"output": str(output)}).digest == reference


def test_a_read_error_below_pyarrow_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    from llmt_prep.documents import split_into_units

    monkeypatch.setattr(pq, "ParquetFile", lambda *_, **__: fail())
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read: Input/output error"):
        split_into_units(tmp_path / "a.parquet", "auto", 1)


def test_a_file_without_permission_is_named(
    mix: dict[str, Any], corpus_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, theirs = Path.open, corpus_dir / "more.jsonl.gz"

    def open_(path: Path, *rest: Any, **more: Any) -> Any:
        if path == theirs:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really(path, *rest, **more)

    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(ConfigError, match=r"more\.jsonl\.gz: cannot be read: Permission denied"):
        build(mix)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("setting", ["output", "cache"])
def test_where_nothing_may_be_written_the_place_is_named(
    mix: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, error: int
) -> None:
    really, place = os.mkdir, str(tmp_path / "theirs" / setting)

    def mkdir(path: Any, *rest: Any, **more: Any) -> None:
        if str(path).startswith(str(tmp_path / "theirs")):
            raise OSError(error, os.strerror(error), str(path))
        really(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(ConfigError, match=r"theirs.*(denied|Read-only).* choose another `(output|cache)"):
        build(mix | {setting: place})


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A full disk, as far as one process can have one: no file may grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stopped_by(mix: dict[str, Any]) -> Stopped | None:
    try:
        build(mix)
    except Stopped as stopped:
        return stopped
    return None


def test_a_disk_that_is_full_in_any_stage_ends_with_4_and_the_rest_is_done_later(
    mix: dict[str, Any], reference: str
) -> None:
    messages = []
    for kilobytes in range(0, 200, 8):
        with largest_file(1000 * kilobytes):
            stopped = stopped_by(mix)
        if stopped is None:
            break
        assert stopped.exit_code == 4
        assert not Path(mix["output"]).exists()
        messages.append(str(stopped))
    for place in ("data.lock", "tokenizer.json", "units/", "data/train/tokens"):
        assert any(place in message for message in messages), place
    assert all("no room left on the disk while writing" in message for message in messages)
    assert build(mix).digest == reference
    assert leftovers(mix) == []


SMALL_DISK = """
import json, resource, subprocess, sys
from pathlib import Path
from llmt_prep.config import MixConfig
from llmt_prep.pipeline import build_dataset
from llmt_prep.stopping import stoppable
from llmt_shared.errors import Stopped

disk, mix, stages, size = sys.argv[1], MixConfig.model_validate_json(sys.argv[2]), [], 64
while True:
    subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
    try:
        with stoppable():
            print(json.dumps([build_dataset(mix, workers=1).digest, stages]))
        break
    except Stopped as stopped:
        assert "no room left on the disk while writing" in str(stopped), stopped
        staging = Path(disk, "data.staging")
        stages.append(sorted(path.name for path in staging.iterdir()) if staging.exists() else [])
    size += 48
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def run_python(code: str, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **more)


def test_a_small_disk_that_grows_is_filled_step_by_step_to_the_same_dataset(
    mix: dict[str, Any], small_disk: Path
) -> None:
    mix |= {"output": str(small_disk / "data"), "shard_size": 40_000, "unit_size": 20_000}
    reference = reference_of(mix | {"output": str(small_disk.parent / "again" / "data")})
    result = run_python(SMALL_DISK, str(small_disk), MixConfig.model_validate(mix).model_dump_json(exclude_unset=True))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    digest, stages = json.loads(result.stdout)
    assert digest == reference
    assert [] in stages  # while tokenizing
    assert any("data" in names for names in stages)  # while gathering


def test_two_runs_at_once_share_a_cache(mix: dict[str, Any], tmp_path: Path, reference: str) -> None:
    mix |= {"cache": str(tmp_path / "cache"), "unit_size": 20_000, "workers": 1}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    running = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.yaml"
        with path.open("w") as file:
            YAML().dump(mix | {"output": str(tmp_path / name / "data")}, file)
        command = [sys.executable, "-m", "llmt_prep", "pack", "--mix", str(path), "--json"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    for process in running:
        out, log = process.communicate()
        assert process.returncode == 0, log
        assert json.loads(out)["digest"] == reference


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found through /proc")
def test_a_worker_that_is_killed_ends_the_run_with_4_and_the_rest_is_done_later(
    mix: dict[str, Any], reference: str
) -> None:
    def kill() -> None:
        units = Path(mix["output"]).parent / ".llmt-cache" / "units"
        while not (found := list(units.glob("*/.*.tmp"))):
            time.sleep(0.001)
        os.kill(int(found[0].name.split(".")[-2]), signal.SIGKILL)  # see `durable.temporary_name`

    mix["engine"] = "tokenizers"  # the slow one
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(Stopped, match="run the same command again"):
        build(mix, workers=2)
    killer.join()
    assert not Path(mix["output"]).exists()
    assert build(mix).digest == reference
    assert leftovers(mix) == []


@pytest.mark.parametrize("name", ["help/a.jsonl", "more.jsonl.gz", "plain/3.txt"])
@pytest.mark.parametrize("change", ["truncated", "appended to", "touched"])
def test_a_file_that_changes_while_it_is_read_is_named_and_nothing_of_it_is_kept(
    mix: dict[str, Any], corpus_dir: Path, tmp_path: Path, name: str, change: str
) -> None:
    path = corpus_dir / name
    mix = alone(mix, path)
    reference = reference_of(mix)
    before, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)

    def disturb() -> None:
        if change == "truncated":
            os.truncate(path, len(before) // 2 + 1)
        elif change == "appended to":
            path.write_bytes(before + b"more")
        else:
            os.utime(path, ns=(times[0], times[1] + 10**9))

    try:
        for opening in range(1, openings(mix, path) + 1):
            output = tmp_path / str(opening) / "data"
            with (
                watching(path, disturb, opening),
                pytest.raises(DataError, match=f"{path.name}: (changed|not a whole)"),
            ):
                build(mix | {"output": str(output)})
            path.write_bytes(before)
            os.utime(path, ns=times)
            assert not output.exists()
            assert build(mix | {"output": str(output)}).digest == reference
    finally:
        path.write_bytes(before)
        os.utime(path, ns=times)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found through /proc")
@pytest.mark.parametrize(("num_kills", "megabytes"), [(5, 1), pytest.param(40, 8, marks=pytest.mark.slow)])
def test_killed_runs_go_on_to_the_same_dataset_and_leave_nothing(
    tmp_path: Path, num_kills: int, megabytes: float
) -> None:
    report = kills.campaign(tmp_path, num_kills, builds=1 + num_kills // 8, megabytes=megabytes, seed=1)
    assert len(report.kills) >= num_kills
    assert report.wrong == []
