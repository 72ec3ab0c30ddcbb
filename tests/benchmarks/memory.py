"""Peak memory of `llmt-prep pack`, all processes together, with the default settings, on little and on much input.

usage: python tests/benchmarks/memory.py CORPUS_FOLDER WORK_FOLDER [--engine auto] [--megabytes 200 2000]

CORPUS_FOLDER is what corpus.py wrote; where its corpus is too small it is grown (see grow.py). Resident memory (RSS)
is summed over all processes, so pages that they share count once for each; PSS shares such pages out among them.
RSS is read from /proc every 20 ms; PSS, which is slower to read, every 500 ms.
"""

import argparse
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jobs
from grow import grow
from measure import machine, table

RSS_SECONDS = 0.02
PSS_SECONDS = 0.5


class Peak(NamedTuple):
    """Megabytes of one run."""

    seconds: float
    rss: float
    pss: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 2000])
    said = parser.parse_args()
    command = jobs.pack((said.corpus / "tokenizer").absolute(), said.engine, said.workers)
    peaks = {}
    for megabytes in said.megabytes:
        corpus = _grown(said.corpus / "corpus.jsonl", megabytes, said.work)
        peaks[megabytes] = measure(command, corpus, said.work)
    print(f"{machine()}; engine {said.engine}, {said.workers} workers\n")
    print(table(["MB of input", "s", "peak RSS, MB", "peak PSS, MB", "RSS / first"], _rows(peaks)))


def measure(command: Callable[[Path, Path], jobs.Command], corpus: Path, work: Path) -> Peak:
    """Pack from nothing and watch the process and all that it starts."""
    home = work / "run"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    with (home / "stderr").open("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command(corpus, home), stdout=subprocess.DEVNULL, stderr=errors)
        rss, pss = _watch(process)
        seconds = time.perf_counter() - started
        if process.returncode:
            raise SystemExit((home / "stderr").read_text()[-2000:])
    shutil.rmtree(home)
    return Peak(seconds, rss / 1e6, pss / 1e6)


def _watch(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    rss = pss = 0
    next_pss = time.perf_counter()
    while process.poll() is None:
        pids = list(family(process.pid))
        rss = max(rss, sum(kilobytes(pid, "status", "VmRSS:") for pid in pids))
        if time.perf_counter() >= next_pss:
            pss = max(pss, sum(kilobytes(pid, "smaps_rollup", "Pss:") for pid in pids))
            next_pss = time.perf_counter() + PSS_SECONDS
        time.sleep(RSS_SECONDS)
    return rss * 1024, pss * 1024


def family(pid: int) -> Iterator[int]:
    """A process and its descendants; one that has ended has none."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            numbers = children.read_text().split()
        except OSError:  # ended meanwhile
            continue
        for child in numbers:
            yield from family(int(child))


def kilobytes(pid: int, file: str, key: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:  # ended meanwhile
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(key))


def _grown(corpus: Path, megabytes: int, work: Path) -> Path:
    path = work / "inputs" / f"grown-{megabytes}" / "corpus.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        grow(corpus, partial, megabytes * 1_000_000)
        partial.rename(path)
    return path


def _rows(peaks: dict[int, Peak]) -> Iterator[list[str]]:
    first = next(iter(peaks.values()))
    for megabytes, peak in peaks.items():
        ratio = f"{peak.rss / first.rss:.3f}"
        yield [f"{megabytes}", f"{peak.seconds:.0f}", f"{peak.rss:.0f}", f"{peak.pss:.0f}", ratio]


if __name__ == "__main__":
    main()
