"""What Ray costs `llmt-prep pack`: its start-up, and more time for the work, against local processes.

usage: python tests/benchmarks/ray_overhead.py CORPUS_FOLDER WORK_FOLDER [--megabytes 600] [--engine tokenizers]

CORPUS_FOLDER is what corpus.py wrote; where its corpus is too small it is grown (see grow.py). Three ways, in turns,
from nothing each time: two local processes; a Ray cluster that the run starts, of one node with two CPUs; two raylets
with a CPU each, which run already. Start-up is the time of a tiny corpus less that of the local processes; the work is
the time of the whole corpus less that of the tiny one. All datasets must be the same. Wanted: start-up of at most 15 s,
and at most 10 % more for the work. Needs two cores that nothing else uses: Ray runs its workers at nice 15. Fewer than
64 MB are too few units to say anything.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jobs
from grow import grow
from measure import TINY_BYTES, Command, Job, Result, machine, run_all, table
from ray_cluster import MEMORY, running_cluster

LOCAL, ALONE, RAYLETS = "2 local processes", "Ray, started by the run", "Ray, two raylets that run"
CORES = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--engine", default="tokenizers", help="the slow one, so that the work takes minutes")
    parser.add_argument("--runs", type=int, default=0, help="of each way; by default 3 where they are long, else 5")
    said = parser.parse_args()
    said.work.mkdir(parents=True, exist_ok=True)
    corpus = said.work / f"{said.megabytes}.jsonl"
    if not corpus.exists():
        grow(said.corpus / "corpus.jsonl", corpus, said.megabytes * 1_000_000)
    pack = jobs.pack((said.corpus / "tokenizer").absolute(), said.engine, workers=len(CORES))
    with running_cluster() as cluster, tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as short:
        os.environ["RAY_TMPDIR"] = short  # of the one that the run starts: names of sockets must be short
        ways = {
            LOCAL: with_options(pack),
            ALONE: with_options(pack, "executor=ray", "ray.address=local"),
            RAYLETS: with_options(pack, "executor=ray", f"ray.address={cluster.address}", f"ray.memory={MEMORY}"),
        }
        todo = {name: Job(command, corpus, CORES, after=written) for name, command in ways.items()}
        results = run_all(todo, said.work, said.runs)
    print(f"{machine()}; engine {said.engine}, {said.megabytes} MB\n")
    print(table(["", "s", "tiny corpus, s", "start-up of Ray, s", "the work, s", "against local"], rows(results)))
    found = {result.written["digest"] for result in results.values()}
    if len(found) > 1:
        sys.exit("the datasets differ")


def with_options(pack: Callable[[Path, Path], Command], *options: str) -> Callable[[Path, Path], Command]:
    """The command with more settings; a tiny corpus is cut into units, for a single one would need no cluster."""

    def command(corpus: Path, home: Path) -> Command:
        is_tiny = corpus.stat().st_size < 10 * TINY_BYTES
        return [*pack(corpus, home), "--json", *options, *(["unit_size=50000"] if is_tiny else [])]

    return command


def written(home: Path) -> dict[str, int]:
    """The first digits of the digest: a path in it would differ, so the corpus lies in one place for all."""
    return {"digest": int(json.loads((home / "stdout").read_text().splitlines()[-1])["digest"][:12], 16)}


def rows(results: dict[str, Result]) -> list[list[str]]:
    local = results[LOCAL]
    return [
        [
            name,
            f"{result.seconds:.1f} ({result.spread[0]:.1f}-{result.spread[1]:.1f})",
            f"{result.startup:.1f}",
            f"{result.startup - local.startup:.1f}",
            f"{result.net_seconds:.1f}",
            f"{result.net_seconds / local.net_seconds - 1:+.1%}",
        ]
        for name, result in results.items()
    ]


if __name__ == "__main__":
    main()
