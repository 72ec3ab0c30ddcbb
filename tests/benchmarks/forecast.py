"""The simulation against the run that it foresees: rows, fill, disk of each place, time of each stage.

usage: python tests/benchmarks/forecast.py WORK_FOLDER [--megabytes 1000] [--workers 2] [--runs 3] [--engine auto]

WORK_FOLDER gets a corpus (see corpus.py; beyond 300 MB see grow.py) in several files, which a later call finds again.
In turns, `llmt-prep pack --simulate` looks at a sample of it, and `llmt-prep pack` packs all of it into a fresh output
from a fresh cache. Printed are medians over the runs; read the times of a busy machine by the processor's seconds.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import corpus as texts
from grow import grow
from jobs import LLMT_PREP
from measure import machine, table

LENGTH = 4096
FILES = 16
DISTINCT_MEGABYTES = 300
POLL_SECONDS = 0.05
PLACES = ("input", "cache", "plan", "sidecars", "dataset", "peak", "final")


class Real(NamedTuple):
    """One real run."""

    seconds: float
    cpu_seconds: float
    stages: dict[str, float]
    disk: dict[str, int]
    splits: dict[str, dict[str, int]]


def main() -> None:
    said = _arguments()
    folder = made_corpus(said.work, said.megabytes)
    mix = said.work / "mix.json"
    settings = f"machines=1,cores={said.workers},sample={said.sample}"
    predicted, real = [], []
    for number in range(said.runs):
        home = said.work / "run"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        mix.write_text(json.dumps(_mix(folder, home, said.engine)))
        predicted.append(simulated(mix, settings, said.workers))
        real.append(packed(mix, folder, home, said.workers))
        foreseen, took = predicted[-1]["forecast"]["seconds"], real[-1]
        times = f"predicted {foreseen:.2f} s, took {took.seconds:.2f} s, {took.cpu_seconds:.2f} s of processors"
        print(f"run {number + 1}: {times}", file=sys.stderr)
        shutil.rmtree(home)
    print(f"{machine()}; {said.workers} workers; {predicted[0]['measured']['rates']['engine']}; {settings}\n")
    print(table(["", "predicted", "measured", "predicted / measured"], list(_rows(predicted, real))))


def made_corpus(work: Path, megabytes: int) -> Path:
    """Write a corpus of so many MB in `FILES` files, and a tokenizer, where they are not there yet."""
    folder = work / f"corpus-{megabytes}"
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    found = texts.documents([texts.sysconfig.get_paths()["purelib"], texts.sysconfig.get_paths()["stdlib"], "/usr"])
    trained = texts.write(folder / "distinct", found, min(megabytes, DISTINCT_MEGABYTES) * 1_000_000)
    texts.train(trained, folder / "tokenizer")
    grow(folder / "distinct", folder / "grown", megabytes * 1_000_000)
    _split(folder / "grown", folder / "text")
    (folder / "distinct").unlink()
    (folder / "grown").unlink()
    (folder / "done").touch()
    return folder


def _split(path: Path, folder: Path) -> None:
    """Cut a file into `FILES`, line by line in turns of about the same size."""
    folder.mkdir(exist_ok=True)
    limit = path.stat().st_size // FILES + 1
    with path.open("rb") as lines:
        for number in range(FILES):
            with (folder / f"{number:02d}.jsonl").open("wb") as out:
                while out.tell() < limit and (line := lines.readline()):
                    out.write(line)


def _mix(folder: Path, home: Path, engine: str) -> dict[str, Any]:
    return {
        "output": str(home / "dataset"), "cache": str(home / "cache"), "tokenizer": str(folder / "tokenizer"),
        "engine": engine, "sequence": {"length": LENGTH}, "holdout": {"fraction": 0.02},
        "sources": {"all": {"path": str(folder / "text")}},
    }  # fmt: skip


def simulated(mix: Path, settings: str, workers: int) -> dict[str, Any]:
    command = [*LLMT_PREP, "pack", "--mix", mix, "--dry-run", "--simulate", settings, "--json", "--workers", workers]
    done = subprocess.run(
        [str(each) for each in command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return json.loads(done.stdout)


def packed(mix: Path, folder: Path, home: Path, workers: int) -> Real:
    """Pack from nothing, and look every 50 ms at what lies where."""
    os.sync()
    command = [*LLMT_PREP, "pack", "--mix", mix, "--workers", workers]
    with (home / "stderr").open("w") as errors:
        started = time.perf_counter()
        process = subprocess.Popen([str(each) for each in command], stdout=subprocess.DEVNULL, stderr=errors)
        most = dict.fromkeys(PLACES, 0)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            now = _places(folder, home)
            most = {name: max(size, now[name]) for name, size in most.items()}
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        sys.exit((home / "stderr").read_text()[-2000:])
    report = json.loads((home / "dataset" / "run.json").read_text())
    manifest = json.loads((home / "dataset" / "MANIFEST.json").read_text())
    last = _places(folder, home)
    disk = most | {name: last[name] for name in ("dataset", "final")}
    return Real(seconds, ended[2].ru_utime + ended[2].ru_stime, report["seconds"], disk, manifest["splits"])


def _places(folder: Path, home: Path) -> dict[str, int]:
    staging = home / "dataset.staging"
    found = {
        "input": _bytes(folder / "text"),
        "cache": _bytes(home / "cache"),
        "plan": _bytes(staging / "rows") + _bytes(staging / "corpus"),
        "sidecars": _bytes(staging / "journal"),
        "dataset": _bytes(staging / "data") + _bytes(home / "dataset"),
    }
    everything = sum(found.values())
    return found | {"peak": everything, "final": everything}


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(_size(Path(parent) / name) for parent, _, names in os.walk(path) for name in names)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed meanwhile
        return 0


def _rows(predicted: list[dict[str, Any]], real: list[Real]) -> Iterator[list[str]]:
    forecasts = [each["forecast"] for each in predicted]
    for split in real[0].splits:
        for key in ("rows", "segments"):
            found = [each["splits"].get(split, {}).get(key, 0) for each in forecasts]
            yield _row(f"{split} {key}", found, [each.splits[split][key] for each in real], "{:,.0f}")
        fills = [each.splits[split]["tokens"] / (each.splits[split]["rows"] * LENGTH) for each in real]
        found = [each["splits"].get(split, {}).get("fill", 0) for each in forecasts]
        yield _row(f"{split} fill", found, fills, "{:.4%}")
    for place in PLACES:
        found, measured = [each["disk"][place] / 1e6 for each in forecasts], [each.disk[place] / 1e6 for each in real]
        yield _row(f"disk: {place}, MB", found, measured, "{:,.2f}")
    for stage in ("hash", "tokenize", "plan", "gather", "finish"):
        found = [_seconds(each, stage) for each in forecasts]
        yield _row(f"time: {stage}, s", found, [each.stages[stage] for each in real], "{:.2f}")
    yield _row("time in all, s", [each["seconds"] for each in forecasts], [each.seconds for each in real], "{:.2f}")


def _seconds(forecast: dict[str, Any], stage: str) -> float:
    """Of a stage as run.json counts: joining is part of gathering there."""
    mine = {stage, "join"} if stage == "gather" else {stage}
    return sum(each["seconds"] for each in forecast["stages"] if each["name"].split()[0] in mine)


def _row(name: str, predicted: list[float], measured: list[float], form: str) -> list[str]:
    found, wanted = median(predicted), median(measured)
    spread = f" ({form.format(min(measured))}-{form.format(max(measured))})" if name.startswith("time") else ""
    return [name, form.format(found), form.format(wanted) + spread, f"{found / wanted:.3f}" if wanted else "-"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--sample", default="64MB")
    return parser.parse_args()


if __name__ == "__main__":
    main()
