"""Time and peak memory of planning: survey, selection and the rows of both splits, over lengths that are made up.

`python tests/benchmarks/plan_memory.py [documents ...]` makes units of the token store with web-like lengths and text
hashes (their tokens are holes in files), plans them as one source of 1.5 epochs and as three weighted sources, each
in a process of its own, and removes everything. 1e8 documents need about 6 GB of disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llmt_prep import corpus as corpora
from llmt_prep.config import MixConfig
from llmt_prep.packing import best_fit_decreasing
from llmt_prep.rows import load_rows, write_rows
from llmt_prep.selection import select, windows_of_splits
from llmt_prep.store import unit_folder

sys.path.insert(0, str(Path(__file__).parents[1]))
from synthetic_corpus import key_of, write_unit

UNIT = 500_000
"""Documents of a unit."""

MIXES: dict[str, dict[str, object]] = {
    "one": {"sources": {"web": {"path": "web", "epochs": 1.5}}},
    "three": {
        "budget": "max",
        "max_epochs": 1.5,
        "sources": {name: {"path": name, "weight": weight} for name, weight in (("web", 5), ("code", 3), ("math", 2))},
    },
}
PARTS = {"one": [1.0], "three": [0.6, 0.3, 0.1]}
"""Of the documents, by source."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("documents", nargs="*", type=float, default=[1e6, 1e7])
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "MIX"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), arguments.measure[1])))
        return
    print("documents   mix    select s  rows s  (cpu s)  us/doc  start MB  peak MB  B/doc  rows of 8192  fill")
    for documents in arguments.documents:
        for mix in MIXES:
            with tempfile.TemporaryDirectory(prefix="llmt-plan-") as folder:
                write_corpus(Path(folder), int(documents), PARTS[mix])
                command = [sys.executable, __file__, "--measure", folder, mix]
                found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            report(int(documents), mix, found)


def report(documents: int, mix: str, found: dict[str, float]) -> None:
    seconds = found["select"] + found["rows"]
    print(
        f"{documents:<11,} {mix:6} {found['select']:8.1f} {found['rows']:7.1f} {found['cpu']:8.1f} "
        f"{seconds / documents * 1e6:7.3f} {found['start']:9.0f} {found['peak']:8.0f} "
        f"{(found['peak'] - found['start']) * 1e6 / documents:6.1f} {found['num_rows']:13,.0f}  {found['fill']:.4%}",
        flush=True,
    )


def measure(folder: Path, mix: str) -> dict[str, float]:
    """Plan the corpus of a folder; seconds, and MB of resident memory."""
    config = MixConfig.model_validate(
        {"output": str(folder), "tokenizer": "none", "sequence": {"length": 8192}, "holdout": {"fraction": 0.001}}
        | MIXES[mix]
    )
    corpus = corpora.load(corpora.saved_in(folder))
    best_fit_decreasing(np.ones(2, np.int32), 2)  # compiled before the clock starts
    start, started = resident("VmHWM"), time.monotonic()
    selected = select(config, corpus)
    chosen = time.monotonic()
    for split, windows in windows_of_splits(config, corpus, selected).items():
        write_rows(folder / split, windows, corpus, 8192, "split", config.packing.carry)
    ended, peak, cpu = time.monotonic(), resident("VmHWM"), time.process_time()
    plan = load_rows(folder / "train")
    return {
        "select": chosen - started,
        "rows": ended - chosen,
        "cpu": cpu,
        "start": start,
        "peak": peak,
        "num_rows": plan.num_rows,
        "fill": sum(tally.tokens for tally in plan.tallies) / (8192 * plan.num_rows),
    }


def resident(field: str) -> float:
    """MB of this process, mapped pages included; unlike getrusage it knows nothing of the parent's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e6


def write_corpus(folder: Path, documents: int, parts: list[float]) -> None:
    """Write units of the token store and the list of them."""
    units: list[tuple[int, str]] = []
    rng = np.random.default_rng(0)
    for source, part in enumerate(parts):
        left = int(documents * part)
        while left:
            count = min(left, UNIT)
            lengths = np.minimum(rng.lognormal(6, 1.2, count) + 1, 1 << 20).astype("<u4")  # like the web's
            key = key_of(len(units))
            write_unit(unit_folder(folder, key), lengths, rng.integers(0, 1 << 64, count, "<u8"))
            units.append((source, key))
            left -= count
    files = [(source, f"file-{source}") for source in range(len(parts))]
    corpora.save(corpora.read_corpus(folder, files, units), corpora.saved_in(folder))


if __name__ == "__main__":
    main()
