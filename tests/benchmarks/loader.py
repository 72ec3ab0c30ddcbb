"""llmt's loader against other readers of rows: tokens a second, one core, in the process that would train.

usage: python tests/benchmarks/loader.py WORK_FOLDER [--rows 100000] [--seconds 2] [--rounds 5] [...]

The same packed rows of 4096 tokens, made up by loader_data.py, lie below WORK_FOLDER in the format of every reader,
which gives them in random order as the same five tensors; that they are the same is checked first. llmt's own has two
more, which its attention and losses need, so there are two comparisons. A reader has an environment and a process of
its own. They read in turns, round after round; who does not read is stopped (SIGSTOP).

warm:     all is in the page cache, and has been read before.
dropped:  nothing is; a new process each time, which reads no row twice.
limited:  the same in a memory cgroup of a quarter of the rows' bytes. Needs root; Linux.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from jobs import HERE
from loader_data import LENGTH, write_rows
from measure import machine, table
from peers.environments import PACKAGES, python_of

ROW_BYTES = LENGTH * 2
ENDLESS = 10**12
LEAST_MEMORY = 1 << 26
"""Of `limited`, for a run on a few rows."""


class Reader(NamedTuple):
    """One way of one loader."""

    script: str
    """peers/loader_SCRIPT.py; and the folder of its rows."""
    way: tuple[str, ...] = ()
    environment: str | None = None
    """Of peers/environments.py; ``None`` is llmt's own, which has torch and datasets."""
    rival: str = "llmt, five tensors"
    """Who of us makes the same tensors."""


READERS = {
    "llmt, five tensors": Reader("llmt", ("five",)),
    "np.memmap": Reader("memmap", ("five",)),
    "litdata": Reader("litdata", (), "litdata"),
    "MosaicML MDS": Reader("mosaicml", ("stream",), "mosaicml"),
    "MosaicML MDS, by item": Reader("mosaicml", ("item",), "mosaicml"),
    "datasets, numpy": Reader("datasets", ("numpy",)),
    "datasets, torch": Reader("datasets", ("torch",)),
    "llmt": Reader("llmt", ("bare",), rival="llmt"),
    "np.memmap, all tensors": Reader("memmap", ("all",), rival="llmt"),
    "llmt, prefetched": Reader("llmt", ("prefetched",), rival="llmt"),
}

Answer = dict[str, float]
"""What `loader_job` prints of one reading."""
Rounds = dict[str, list[Answer]]


class Worker:
    """A reader's process; it is stopped except while it reads."""

    def __init__(self, command: list[str | Path], stderr: Path) -> None:
        self._stderr = stderr
        with stderr.open("w") as err:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True
            )
        self._line()  # says that it is ready
        os.kill(self._process.pid, signal.SIGSTOP)

    def read(self, seconds: float, most_rows: int = ENDLESS) -> Answer:
        os.kill(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        print(seconds, most_rows, file=self._process.stdin, flush=True)
        answer = json.loads(self._line())
        os.kill(self._process.pid, signal.SIGSTOP)
        return answer

    def join(self, group: Path) -> None:
        (group / "cgroup.procs").write_text(str(self._process.pid))

    def close(self) -> None:
        """End it: it has no more lines to answer, and is killed where its threads go on."""
        assert self._process.stdin is not None
        os.kill(self._process.pid, signal.SIGCONT)
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(("ready", "{")):  # libraries talk too
                return line
        sys.exit(f"{self._process.args}\nfailed:\n{self._stderr.read_text()[-2000:]}")


class Bench(NamedTuple):
    """What all regimes share."""

    work: Path
    rows: Path
    """Folder of the rows in all formats."""
    num_rows: int
    seconds: float
    num_rounds: int
    readers: dict[str, Reader]

    def command(self, verb: str, name: str, *more: str | Path) -> list[str | Path]:
        reader = self.readers[name]
        python = python_of(reader.environment, self.work / "environments") if reader.environment else sys.executable
        return [python, HERE / "peers" / f"loader_{reader.script}.py", verb, *more]

    def files(self, name: str) -> Path:
        return self.rows / self.readers[name].script

    def worker(self, name: str, micro_rows: int) -> Worker:
        command = self.command("read", name, self.files(name), str(micro_rows), *self.readers[name].way)
        return Worker(command, self.work / f"{self.readers[name].script}.stderr")


def main() -> None:
    said = _arguments()
    os.sched_setaffinity(0, {said.core})  # inherited
    os.environ |= {"HOME": str(said.work / "home"), "HF_HUB_OFFLINE": "1"}
    readers = {name: READERS[name] for name in said.readers}
    bench = Bench(said.work, said.work / f"rows-{said.rows}", said.rows, said.seconds, said.rounds, readers)
    write(bench)
    check(bench)
    print(f"{machine()}; one core; {', '.join(versions(readers))}")
    for micro_rows in said.micro_rows if "warm" in said.regimes else ():
        report(f"warm, micro-batches of {micro_rows}", warm(bench, micro_rows))
    if "dropped" in said.regimes:
        report(f"dropped, micro-batches of {said.micro_rows[0]}", cold(bench, said.micro_rows[0]))
    if "limited" in said.regimes:
        with memory_group(said.group) as group:
            limited = cold(bench, said.micro_rows[0], lambda name, worker: _limit(group, bench.files(name), worker))
        report(f"limited, micro-batches of {said.micro_rows[0]}", limited)


def versions(readers: dict[str, Reader]) -> list[str]:
    ours = [f"{name}=={metadata.version(name)}" for name in ("numpy", "torch", "datasets")]
    return ours + sorted({PACKAGES[each.environment][0] for each in readers.values() if each.environment})


def write(bench: Bench) -> None:
    """Write the rows in all formats that are missing; gigabytes."""
    (bench.work / "home").mkdir(parents=True, exist_ok=True)
    if not bench.rows.exists():
        unfinished = bench.work / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_rows(unfinished, bench.num_rows)
        unfinished.rename(bench.rows)
    for name in bench.readers:
        if not bench.files(name).exists():
            unfinished = bench.rows / "unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            subprocess.run(bench.command("write", name, bench.rows / "flat", unfinished), check=True)
            unfinished.rename(bench.files(name))


def check(bench: Bench) -> None:
    """Leave where two readers do not give the same tensors in one epoch."""
    sums = {}
    for name, reader in bench.readers.items():
        command = bench.command("check", name, bench.files(name), str(bench.num_rows), *reader.way)
        sums[name] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    if len(set(sums.values())) != 1:
        sys.exit(f"readers give different tensors: {sums}")


def warm(bench: Bench, micro_rows: int) -> Rounds:
    workers = {name: bench.worker(name, micro_rows) for name in bench.readers}
    try:
        for name, worker in workers.items():
            _cache(bench.files(name))
            worker.read(5 * bench.seconds, bench.num_rows)
        found: Rounds = {name: [] for name in workers}
        for _ in range(bench.num_rounds):
            for name, worker in workers.items():
                found[name].append(worker.read(bench.seconds))
    finally:
        for worker in workers.values():
            worker.close()
    return found


def cold(bench: Bench, micro_rows: int, prepare: Callable[[str, Worker], None] = lambda name, worker: None) -> Rounds:
    """Read what is not in the page cache, each time by a new process: what is mapped cannot be dropped."""
    found: Rounds = {name: [] for name in bench.readers}
    for _ in range(bench.num_rounds):
        for name in bench.readers:
            _drop(bench.files(name))
            worker = bench.worker(name, micro_rows)
            try:
                prepare(name, worker)
                _drop(bench.files(name))  # again, for opening has read some of it
                found[name].append(worker.read(bench.seconds, bench.num_rows // 2))
            finally:
                worker.close()
    return found


def report(title: str, found: Rounds) -> None:
    """Medians; a ratio is the median of the ratios of all rounds."""
    header = ["", "Mtok/s (min-max)", "Mtok / CPU s", "ms / micro-batch", "llmt with the same tensors / this",
              "the same by CPU", "MB/s from disk", "bytes from disk / of tokens"]  # fmt: skip
    rivals = {name: READERS[name].rival for name in found}
    rows = [_row(name, mine, found.get(rivals[name], [])) for name, mine in found.items()]
    print(f"\n{title}\n\n{table(header, rows)}", flush=True)


def _row(name: str, mine: list[Answer], ours: list[Answer]) -> list[str]:
    rates = [_rate(each, "seconds") for each in mine]
    ratios = [
        f"{median(_rate(a, clock) / _rate(b, clock) for a, b in zip(ours, mine, strict=True)):.2f}" if ours else ""
        for clock in ("seconds", "cpu_seconds")
    ]
    return [
        name,
        f"{median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})",
        f"{median(_rate(each, 'cpu_seconds') for each in mine):.1f}",
        f"{median(1e3 * each['seconds'] / each['batches'] for each in mine):.3f}",
        *ratios,
        f"{median(each['disk_bytes'] / each['seconds'] for each in mine) / 1e6:.0f}",
        f"{median(each['disk_bytes'] / each['rows'] for each in mine) / ROW_BYTES:.2f}",
    ]


def _rate(answer: Answer, clock: str) -> float:
    """Million tokens a second."""
    return answer["rows"] * LENGTH / 1e6 / answer[clock]


def _cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 20):
                    pass


def _drop(folder: Path) -> None:
    """Have the page cache forget the files; needs no privilege, but what a process has mapped stays."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def memory_group(path: Path | None) -> Iterator[Path]:
    """A memory cgroup below this process's own, or ``path``."""
    group = path or _own_group() / "llmt-loader"
    group.mkdir(exist_ok=True)
    try:
        yield group
    finally:
        group.rmdir()


def _own_group() -> Path:
    lines = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.strip("/")
    return Path("/sys/fs/cgroup") / lines[0][2].strip("/")


def _limit(group: Path, files: Path, worker: Worker) -> None:
    """What the worker has in memory already counts elsewhere; what it reads from now on counts here."""
    num_bytes = max(LEAST_MEMORY, sum(path.stat().st_size for path in files.rglob("*") if path.is_file()) // 4)
    name = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
    (group / name).write_text(str(num_bytes))
    worker.join(group)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=lambda path: Path(path).absolute())
    parser.add_argument("--rows", type=int, default=100_000, help="8 kB each, in six formats")
    parser.add_argument("--seconds", type=float, default=2, help="of each reading")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-rows", type=int, nargs="+", default=[8, 4, 1])
    parser.add_argument("--regimes", nargs="+", choices=["warm", "dropped", "limited"], default=["warm", "dropped"])
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--group", type=Path, help="memory cgroup of `limited`; it is made and removed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
