"""Kills packing at random, goes on until each dataset is finished, and compares every one with an undisturbed run's.

usage: python tests/benchmarks/kills.py [--kills N] [--builds N] [--megabytes N] [--seed N] [--folder FOLDER]

A victim of SIGKILL is the main process or one of its two workers. Half of the kills come at a random time, half just
after the staging directory shows that a random stage was reached, so that the short stages have their share. A dataset
is compared byte by byte, by the sha256 of every file, and not by its own manifest. The exit code is 1 where anything
differs, is left behind or ends otherwise than it should. Needs /proc.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

STAGES = ("start", "tokenize", "plan", "gather", "join", "books", "manifest", "publish")
"""As the directories show them: nothing, a note, rows, a journal, columns, ledger, manifest, the finished dataset."""


@dataclass(frozen=True)
class Kill:
    """One process that was killed, and what the run's main process ended with."""

    stage: str
    victim: str
    exit_code: int
    crew: dict[int, str]
    """The run's workers: process id, and when each started."""


@dataclass
class Report:
    """What became of all builds."""

    builds: int = 0
    kills: list[Kill] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    """What lies beside a finished dataset."""
    temporary: list[str] = field(default_factory=list)
    """What killed processes left in the cache, for `llmt-prep cache prune` to remove."""
    survivors: list[str] = field(default_factory=list)
    """Workers that went on without their main process."""
    failures: list[str] = field(default_factory=list)
    """Ends of a run that no kill explains."""

    @property
    def wrong(self) -> list[str]:
        """Everything that should not be; temporary files in a cache may be."""
        return [*self.differing, *self.leftovers, *self.survivors, *self.failures]


@dataclass(frozen=True)
class Build:
    """One dataset to make; its output and cache are its own."""

    mix: Path
    folder: Path

    @property
    def output(self) -> Path:
        """Where the dataset is to appear."""
        return self.folder / "out" / "data"

    def start(self) -> subprocess.Popen[bytes]:
        """Start a run of the command."""
        settings = [f"output={self.output}", f"cache={self.folder / 'cache'}"]
        command = [sys.executable, "-m", "llmt_prep", "pack", "--mix", str(self.mix), "--workers", "2", *settings]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def stage(self) -> int:
        """Index in STAGES of how far the directories have come."""
        staging = self.output.with_name("data.staging")
        data = staging / "data"
        signs = (
            [staging / "recipe.json"], [staging / "rows"], [staging / "journal"], data.glob("*/row_offsets"),
            [data / "ledger.json"], [data / "MANIFEST.json"], [self.output / "MANIFEST.json"],
        )  # fmt: skip
        reached = [number for number, paths in enumerate(signs, 1) if any(path.exists() for path in paths)]
        return max(reached, default=0)


def campaign(folder: Path, kills: int, builds: int, megabytes: float, seed: int) -> Report:
    """Kill until there have been so many kills in so many builds, and finish each of these.

    Args:
        folder: where the corpus and the datasets are written; a dataset is removed once it is compared.
        kills: SIGKILLs, at least.
        builds: datasets, at least.
        megabytes: of text.
        seed: of every choice; the machine's timing is what no seed repeats.
    """
    random, report = Random(seed), Report()
    reference = Build(write_corpus(folder, megabytes), folder / "reference")
    started = time.monotonic()
    if reference.start().wait():
        sys.exit((reference.folder / "log").read_text())
    seconds, wanted = time.monotonic() - started, files_of(reference.output)
    while report.builds < builds or len(report.kills) < kills:
        build = Build(reference.mix, folder / f"build-{report.builds}")
        disturb(build, random, seconds, most=-(-kills // builds), report=report)
        compare(build, wanted, report)
        shutil.rmtree(build.folder)
        report.builds += 1
    return report


def disturb(build: Build, random: Random, seconds: float, most: int, report: Report) -> None:
    """Run the command again and again, killed each time, until it ends well or was killed so often."""
    kills = []
    while len(kills) < most and (kill := kill_one(build, random, seconds)) is not None:
        kills.append(kill)
        if kill.exit_code != (-signal.SIGKILL if kill.victim == "main" else 4):
            report.failures.append(f"{build.folder.name}: {kill}")
    report.kills += kills
    if code := build.start().wait():
        report.failures.append(f"{build.folder.name}: exit code {code}: {(build.folder / 'log').read_text()[-2000:]}")
    for kill in kills:
        report.survivors += [f"{build.folder.name}: {pid}" for pid, began in kill.crew.items() if alive(pid) == began]


def kill_one(build: Build, random: Random, seconds: float) -> Kill | None:
    """Start a run and kill one of its processes; ``None`` where the run ended well all the same."""
    process = build.start()
    wait_for_a_moment(build, process, random, seconds)
    crew, stage = workers(process.pid), STAGES[build.stage()]
    victim = random.choice([process.pid, random.choice(sorted(crew) or [process.pid])])
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    if code := process.wait():
        return Kill(stage, "main" if victim == process.pid else "worker", code, crew)
    return None


def wait_for_a_moment(build: Build, process: subprocess.Popen[bytes], random: Random, seconds: float) -> None:
    """Wait for a random time, or for a random stage and a little longer."""
    begin, stage = build.stage(), random.randrange(1, len(STAGES))
    if stage <= begin or random.random() < 0.5:
        deadline = time.monotonic() + random.uniform(0, seconds / 2 if begin else seconds)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        return
    while process.poll() is None and build.stage() < stage:
        time.sleep(0.0005)
    time.sleep(random.choice([0, random.uniform(0, 0.02), random.uniform(0, 0.3)]))


def workers(main: int) -> dict[int, str]:
    """Worker processes of a run: process id and when each started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended while we looked
            if status(folder)[1] == str(main) and b"spawn_main" in (folder / "cmdline").read_bytes():
                found[int(folder.name)] = status(folder)[19]
    return found


def alive(pid: int) -> str | None:
    """When a process started, where there is one; a zombie is none: it waits for its new parent to take notice."""
    with suppress(OSError):
        fields = status(Path("/proc", str(pid)))
        return None if fields[0] == "Z" else fields[19]
    return None


def status(folder: Path) -> list[str]:
    """Fields of /proc/PID/stat from the state on: 1 is the parent, 19 the time of the start (man 5 proc)."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def compare(build: Build, wanted: dict[str, str], report: Report) -> None:
    """Hold the finished dataset against the reference, and look for what should not be there any more."""
    found = files_of(build.output)
    if found != wanted:
        names = sorted({name for name, _ in found.items() ^ wanted.items()})
        report.differing.append(f"{build.folder.name}: {', '.join(names[:5])}")
    report.leftovers += [str(path) for path in build.output.parent.iterdir() if path != build.output]
    report.temporary += map(str, (build.folder / "cache").rglob("*.tmp"))


def files_of(dataset: Path) -> dict[str, str]:
    """sha256 of every file by its name; run.json is of the run and not of the dataset."""
    files = [path for path in dataset.rglob("*") if path.is_file() and path.name != "run.json"]
    return {path.relative_to(dataset).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_corpus(folder: Path, megabytes: float) -> Path:
    """Write Python's own sources as four sources in four formats, and a tokenizer; returns the mix."""
    texts = list(sources(int(megabytes * 1e6)))
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    for number in range(2):
        (folder / f"{number}.jsonl").write_bytes(b"".join(lines[number::6]))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[2::6])))
    pq.write_table(pa.table({"text": texts[3::6]}), folder / "d.parquet", row_group_size=8)
    (folder / "e.txt").write_text("\n".join(texts[4::6]) + "\n")
    paths = {"lines": "*.jsonl", "zstd": "c.jsonl.zst", "table": "d.parquet", "text": "e.txt"}
    mix = {
        "output": "none", "tokenizer": str(write_tokenizer(folder / "tokenizer", texts[5::6])),
        "sequence": {"length": 512}, "holdout": {"fraction": 0.05}, "unit_size": 200_000, "shard_size": 100_000,
        "sources": {name: {"path": str(folder / path)} for name, path in paths.items()},
    }  # fmt: skip
    mix["sources"]["text"] |= {"record": "line", "epochs": 1.5}
    with (folder / "mix.yaml").open("w") as file:
        YAML().dump(mix, file)
    return folder / "mix.yaml"


def sources(wanted: int) -> Iterator[str]:
    """Texts of the standard library, in the order of their names, of so many bytes in all."""
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        try:
            text = path.read_text("utf-8")
        except ValueError:
            continue
        if "site-packages" not in path.parts and size < wanted:
            size += len(text)
            yield text


def write_tokenizer(folder: Path, texts: list[str]) -> Path:
    """A byte-level BPE of 1000 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[:40], trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder


def table(report: Report) -> str:
    """Return kills by stage and victim, then what was found wrong."""
    counts = Counter((kill.stage, kill.victim) for kill in report.kills)
    lines = ["| stage | main | worker |", "|---|---|---|"]
    lines += [f"| {stage} | {counts[stage, 'main']} | {counts[stage, 'worker']} |" for stage in STAGES]
    lines += ["", f"kills: {len(report.kills)}, builds: {report.builds}"]
    for name in ("differing", "leftovers", "temporary", "survivors", "failures"):
        lines += [f"{name}: {len(getattr(report, name))}", *(f"  {each}" for each in getattr(report, name))]
    return "\n".join(lines)


def main() -> None:
    """Run a campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--builds", type=int, default=40)
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=said.folder) as folder:
        report = campaign(Path(folder), said.kills, said.builds, said.megabytes, said.seed)
    print(table(report))
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
