"""Peak memory and time of `llmt-prep pack` by the number of units: what each costs the coordinator and every worker.

usage: python tests/benchmarks/unit_memory.py WORK_FOLDER [--units 2000 20000 100000] [--workers 2]

Every unit is one line of 128 bytes, 1000 of them to a file, and of 16 only one has a text, so that next to nothing but
units is there. A run from nothing is followed by one with another seed, which finds all units in the cache. Bytes for
each unit are the growth from one row to the next.
WORK_FOLDER should lie in memory (/dev/shm): on a disk the fsync of so many small files is most of the time.

`VmHWM` counts mapped pages of files, which all processes of a machine share, and `RssAnon` what a process has for
itself. Both are read from /proc every 20 ms.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from measure import machine, table
from memory import family, kilobytes

sys.path.insert(0, str(Path(__file__).parents[1]))
import small_tokenizers

LINE = 128
"""Bytes."""
LINES = 1000
"""Of a file."""
TEXTS_IN = 16
"""Lines: one with a text."""
SECONDS = 0.02


class Peaks(NamedTuple):
    """Bytes of the process that was started, and of the largest that it started."""

    seconds: float
    coordinator: int
    coordinator_anonymous: int
    worker: int
    worker_anonymous: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--units", type=int, nargs="+", default=[2000, 20_000, 100_000])
    parser.add_argument("--workers", type=int, default=2)
    said = parser.parse_args()
    tokenizer = small_tokenizers.save(
        small_tokenizers.byte_level_bpe(), said.work / "tokenizer", eos_token=small_tokenizers.EOT
    )
    found: dict[str, dict[int, Peaks]] = {"first": {}, "again": {}}
    for count in said.units:
        home = said.work / "run"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        write_lines(home / "lines", count)
        for seed, run in enumerate(found):
            found[run][count] = watched(command(home, tokenizer, count, seed, said.workers), home / "stderr")
            print(f"{count} units, {run}: {found[run][count].seconds:.1f} s", file=sys.stderr)
        shutil.rmtree(home)
    print(f"{machine()}; {said.workers} workers\n")
    header = ["run", "units", "s", "coordinator, MB", "anonymous", "B/unit", "worker, MB", "anonymous", "B/unit"]
    print(table(header, [row for run, peaks in found.items() for row in rows(run, peaks)]))


def write_lines(folder: Path, count: int) -> None:
    """Lines of `LINE` bytes, all different, most of them without a text, in files of `LINES` lines."""
    folder.mkdir()
    for first in range(0, count, LINES):
        with (folder / f"{first:09}.jsonl").open("wb") as file:
            for number in range(first, min(first + LINES, count)):
                text = "" if number % TEXTS_IN else f"document {number} " * 4
                start = json.dumps({"text": text, "other": f"{number}"}).encode()[:-2]
                file.write(start + b"x" * (LINE - len(start) - 3) + b'"}\n')


def command(home: Path, tokenizer: Path, count: int, seed: int, workers: int) -> list[str]:
    """Pack the lines, a unit each, into shards enough for all workers."""
    mix = {
        "output": str(home / f"dataset-{seed}"), "cache": str(home / "cache"), "tokenizer": str(tokenizer),
        "engine": "tokenizers", "sequence": {"length": 2048}, "seed": seed, "unit_size": LINE,
        "shard_size": count * LINE // 64, "sources": {"lines": {"path": str(home / "lines")}},
    }  # fmt: skip
    (home / "mix.yaml").write_text(json.dumps(mix))
    return [sys.executable, "-m", "llmt_prep", "pack", "--mix", str(home / "mix.yaml"), "--workers", str(workers)]


def watched(command: list[str], log: Path) -> Peaks:
    """Run to the end and watch the process and all that it starts."""
    peaks: dict[int, list[int]] = {}
    with log.open("w") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            for pid in family(process.pid):
                now = [1024 * kilobytes(pid, "status", key) for key in ("VmHWM:", "RssAnon:")]
                before = peaks.get(pid, now)
                is_another = 0 < now[0] < before[0]  # program: what it was before was a copy of its parent
                peaks[pid] = now if is_another else [max(pair) for pair in zip(now, before, strict=True)]
            time.sleep(SECONDS)
        seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(log.read_text()[-2000:])
    own = peaks.pop(process.pid)
    workers = [max(column) for column in zip([0, 0], *peaks.values(), strict=True)]
    return Peaks(seconds, *own, *workers)


def rows(run: str, peaks: dict[int, Peaks]) -> list[list[str]]:
    """Of the table; growth is that from the row above."""
    found, before = [], None
    for count, peak in peaks.items():
        cells = [run, f"{count}", f"{peak.seconds:.1f}"]
        for place in (1, 3):
            growth = f"{(peak[place] - before[1][place]) / (count - before[0]):.0f}" if before else ""
            cells += [f"{peak[place] / 1e6:.1f}", f"{peak[place + 1] / 1e6:.1f}", growth]
        found.append(cells)
        before = count, peak
    return found


if __name__ == "__main__":
    main()
