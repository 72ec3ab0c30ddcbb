"""Whole processes on chosen cores, and their medians: what the benchmarks of this folder share.

Everything is run in turns, round after round, so that a machine that slows down slows all sides.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median, median_low
from typing import NamedTuple

Command = Sequence[str | Path]

TINY_BYTES = 300_000
"""Input of the runs that show what starting up costs."""
LONG_SECONDS = 60
"""Of runs that take longer, 3 are enough; of others 5 are made."""


class Run(NamedTuple):
    """One process and those that it waited for."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Resident memory of the largest process."""
    stdout: str


class Job(NamedTuple):
    """Something to time: ``command(corpus, home)`` works on one JSONL file and writes below ``home`` only."""

    command: Callable[[Path, Path], Command]
    corpus: Path
    cores: Sequence[int] = (0,)
    after: Callable[[Path], dict[str, int]] | None = None
    """Called with ``home`` when the run is over: numbers about what was written there; medians are kept."""


class Round(NamedTuple):
    """One turn of a job."""

    tiny: Run
    whole: Run
    written: dict[str, int]


class Result(NamedTuple):
    """Median of the runs on a corpus, and of those on its first `TINY_BYTES`."""

    seconds: float
    spread: tuple[float, float]
    cpu_seconds: float
    """Much less than ``seconds`` where the machine was busy with other things."""
    startup: float
    num_bytes: int
    tiny_bytes: int
    peak_bytes: int
    """Resident memory of the largest process."""
    written: dict[str, int]

    @property
    def rate(self) -> float:
        """MB/s of the whole process."""
        return self.num_bytes / 1e6 / self.seconds

    @property
    def net_rate(self) -> float:
        """MB/s less start-up: what the bytes beyond the tiny run cost."""
        return (self.num_bytes - self.tiny_bytes) / 1e6 / self.net_seconds

    @property
    def net_seconds(self) -> float:
        return self.seconds - self.startup


def run_all(jobs: dict[str, Job], work: Path, num_runs: int = 0) -> dict[str, Result]:
    """Time every job in turns, each time from nothing.

    Args:
        jobs: by name.
        work: folder for everything written; what runs leave is removed.
        num_runs: of each job; 0 is 5, or 3 where one takes more than `LONG_SECONDS`.
    """
    for job in jobs.values():  # the first run of all compiles and fills the page cache
        _in_fresh_home(job, head(job.corpus, TINY_BYTES, work), work)
    rounds: dict[str, list[Round]] = {name: [] for name in jobs}
    while todo := [name for name, done in rounds.items() if len(done) < (num_runs or _enough(done))]:
        for name in todo:
            rounds[name].append(_round(jobs[name], work))
            print(f"{name}: {rounds[name][-1].whole.seconds:.2f} s", file=sys.stderr)
    return {name: _result(jobs[name], done, work) for name, done in rounds.items()}


def run(command: Command, cores: Iterable[int], home: Path) -> Run:
    """Run to the end on the given cores, with caches and temporary files below ``home``; leave if it fails."""
    environment = os.environ | {"HOME": str(home), "TMPDIR": str(home), "HF_HUB_OFFLINE": "1"}
    os.sync()  # what the run before left unwritten must not be written on this one's time
    with (home / "stdout").open("w") as out, (home / "stderr").open("w") as err:
        os.sched_setaffinity(0, cores)  # inherited
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nfailed:\n{(home / 'stderr').read_text()[-2000:]}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Run(seconds, cpu_seconds, usage.ru_maxrss * 1024, (home / "stdout").read_text())


def head(corpus: Path, num_bytes: int, folder: Path) -> Path:
    """The first lines of a corpus, at least ``num_bytes``, as the only file of a folder; the page cache holds it."""
    path = folder / "inputs" / str(num_bytes) / "corpus.jsonl"
    if not path.exists() or path.stat().st_mtime < corpus.stat().st_mtime:
        path.parent.mkdir(parents=True, exist_ok=True)
        with corpus.open("rb") as lines, path.open("wb") as out:
            while out.tell() < num_bytes and (line := lines.readline()):
                out.write(line)
            if out.tell() < num_bytes:
                sys.exit(f"{corpus}: {out.tell() / 1e6:.0f} MB; wanted {num_bytes / 1e6:.0f} MB; see grow.py")
    with path.open("rb") as file:  # in pieces: what this process holds counts as the peak of those that it starts
        while file.read(1 << 20):
            pass
    return path


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def machine() -> str:
    """Return processor, cores and Python in one line."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(": ")[2] if models else platform.machine()
    return f"{name}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"


def _enough(done: Sequence[Round]) -> int:
    return 3 if done and done[0].whole.seconds > LONG_SECONDS else 5


def _round(job: Job, work: Path) -> Round:
    tiny, _ = _in_fresh_home(job, head(job.corpus, TINY_BYTES, work), work)
    return Round(tiny, *_in_fresh_home(job, job.corpus, work))


def _in_fresh_home(job: Job, corpus: Path, work: Path) -> tuple[Run, dict[str, int]]:
    home = work / "run"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    done = run(job.command(corpus, home), job.cores, home)
    written = job.after(home) if job.after else {}
    shutil.rmtree(home)
    return done, written


def _result(job: Job, done: Sequence[Round], work: Path) -> Result:
    seconds = [each.whole.seconds for each in done]
    return Result(
        seconds=median(seconds),
        spread=(min(seconds), max(seconds)),
        cpu_seconds=median(each.whole.cpu_seconds for each in done),
        startup=median(each.tiny.seconds for each in done),
        num_bytes=job.corpus.stat().st_size,
        tiny_bytes=head(job.corpus, TINY_BYTES, work).stat().st_size,
        peak_bytes=max(each.whole.peak_bytes for each in done),
        written={key: median_low(each.written[key] for each in done) for key in done[0].written},
    )
