"""llmt-prep pack against the bare engine, two workers against one, and packing again with another row length.

usage: python tests/benchmarks/baseline.py CORPUS_FOLDER WORK_FOLDER [--engines tokenizers fastokens] [...]

CORPUS_FOLDER is what corpus.py wrote. Start-up is a run on the first 0.3 MB and is taken off both sides.
"""

import argparse
from pathlib import Path

import jobs
from measure import Job, Result, head, machine, run, run_all, table

REPACKED_LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--engines", nargs="+", default=["tokenizers", "fastokens"])
    parser.add_argument("--megabytes", type=float, default=300)
    parser.add_argument("--runs", type=int, default=0, help="of each; 0: 5, or 3 where one takes more than 60 s")
    said = parser.parse_args()
    tokenizer = (said.corpus / "tokenizer").absolute()
    corpus = head(said.corpus / "corpus.jsonl", int(said.megabytes * 1e6), said.work)
    todo: dict[str, Job] = {}
    for engine in said.engines:
        todo[f"bare {engine}"] = Job(jobs.bare(tokenizer, engine), corpus)
        todo[f"pack {engine}"] = Job(jobs.pack(tokenizer, engine), corpus, after=_repacked)
        todo[f"pack {engine}, 2 workers"] = Job(jobs.pack(tokenizer, engine, 2), corpus, (0, 1))
    results = run_all(todo, said.work, said.runs)
    print(f"{machine()}; {corpus.stat().st_size / 1e6:.0f} MB\n")
    print(table(HEADER, [row for engine in said.engines for row in _rows(engine, results)]))


HEADER = ["", "s (min-max)", "CPU s", "start-up, s", "MB/s less start-up", "ratio"]


def _repacked(home: Path) -> dict[str, int]:
    """Pack again from the cache of the run before, with rows of another length, into another output."""
    overrides = [f"output={home / 'again'}", f"sequence.length={REPACKED_LENGTH}"]
    again = run([*jobs.LLMT_PREP, "pack", "--mix", home / "mix.yaml", "--workers", "1", *overrides], (0,), home)
    return {"milliseconds": round(again.seconds * 1000)}


def _rows(engine: str, results: dict[str, Result]) -> list[list[str]]:
    bare, one, two = (results[name] for name in (f"bare {engine}", f"pack {engine}", f"pack {engine}, 2 workers"))
    again = one.written["milliseconds"] / 1000
    faster, net_faster = one.seconds / two.seconds, one.net_seconds / two.net_seconds
    return [
        [f"bare {engine}", *_times(bare), ""],
        [f"pack {engine}", *_times(one), f"{one.net_seconds / bare.net_seconds:.3f} of the bare engine's time"],
        [f"pack {engine}, 2 workers", *_times(two), f"{faster:.2f} times one worker, {net_faster:.2f} less start-up"],
        [f"again with L = {REPACKED_LENGTH}", f"{again:.2f}", *[""] * 3, f"{again / one.seconds:.1%} of the first run"],
    ]


def _times(result: Result) -> list[str]:
    low, high = result.spread
    numbers = (result.cpu_seconds, result.startup, result.net_rate)
    return [f"{result.seconds:.2f} ({low:.2f}-{high:.2f})", *(f"{number:.2f}" for number in numbers)]


if __name__ == "__main__":
    main()
