"""llmt-prep against the field: whole processes on one core, from JSONL to what lies on disk.

usage: python tests/benchmarks/compare.py CORPUS_FOLDER WORK_FOLDER [--engines tokenizers fastokens] [...]

CORPUS_FOLDER is what corpus.py wrote. Environments of the peers, inputs and outputs go below WORK_FOLDER. All run in
turns on core 0. `tokenizers` is slow, so peers get fewer bytes; ratios set our whole process, start-up and all,
against a peer's MB/s less its start-up.
"""

import argparse
from pathlib import Path

import jobs
from measure import Job, Result, head, machine, run_all, table
from peers.environments import PACKAGES, python_of

PEERS = {
    "datatrove": "shuffles and concatenates documents; packs nothing",
    "datasets": "splits long documents; best fit per 1000 documents",
    "trl": "truncates documents at L (its default); best fit per 1000 documents",
    "litdata": "concatenates documents; its reader cuts rows and drops the end of each chunk",
    "mosaicml": "concatenates and cuts documents anywhere; drops the last row",
}
REFERENCE = "tokenizers"
"""The engine of every peer."""
LLMT = "splits long documents; best fit per 65 536 documents, with carry; shuffles; checksums; fsync"


def main() -> None:
    said = _arguments()
    corpus, tokenizer = said.corpus / "corpus.jsonl", (said.corpus / "tokenizer").absolute()
    ours = head(corpus, int(said.megabytes * 1e6), said.work)
    theirs = head(corpus, int(said.peer_megabytes * 1e6), said.work)
    todo: dict[str, Job] = {}
    for engine in said.engines:
        todo[f"llmt {engine}"] = Job(jobs.pack(tokenizer, engine), ours, after=jobs.packed)
        todo[_bare(engine, ours)] = Job(jobs.bare(tokenizer, engine), ours, after=jobs.counted_by_bare)
    if said.peers:
        todo[_bare(REFERENCE, theirs)] = Job(jobs.bare(tokenizer, REFERENCE), theirs, after=jobs.counted_by_bare)
    for name in said.peers:
        python = python_of(name, said.work / "environments")
        todo[name] = Job(jobs.peer(name, python, tokenizer), theirs, after=jobs.written_by_peer(name, python))
    results = run_all(todo, said.work, said.runs)
    print(f"{machine()}; one core; {', '.join(PACKAGES[name][0] for name in said.peers)}\n")
    print(table(_header(said.engines), [_row(name, results, said.engines, todo) for name in todo]))


def _bare(engine: str, file: Path) -> str:
    return f"bare {engine} {file.stat().st_size / 1e6:.0f} MB"


def _header(engines: list[str]) -> list[str]:
    ratios = [f"llmt {engine} / this" for engine in engines]
    return ["", "MB", "s (min-max)", "CPU s", "MB/s", "start-up, s", "MB/s less start-up", *ratios, "s / bare engine",
            "tokens, rows", "lost", "peak MB", "what it does"]  # fmt: skip


def _row(name: str, results: dict[str, Result], engines: list[str], todo: dict[str, Job]) -> list[str]:
    mine = results[name]
    engine = name.split()[1] if name.startswith(("llmt", "bare")) else REFERENCE
    bare = results[_bare(engine, todo[name].corpus)]
    ratios = [f"{results[f'llmt {each}'].rate / mine.net_rate:.2f}" for each in engines]
    tokens, rows = mine.written["tokens"], mine.written["rows"]
    low, high = mine.spread
    return [
        name, f"{mine.num_bytes / 1e6:.0f}", f"{mine.seconds:.1f} ({low:.1f}-{high:.1f})", f"{mine.cpu_seconds:.1f}",
        f"{mine.rate:.2f}",
        f"{mine.startup:.2f}", f"{mine.net_rate:.2f}", *ratios, f"{mine.net_seconds / bare.net_seconds:.3f}",
        f"{tokens:,}, {rows:,}", f"{1 - tokens / bare.written['tokens']:.2%}", f"{mine.peak_bytes / 1e6:.0f}",
        PEERS.get(name, LLMT if name.startswith("llmt") else "writes nothing"),
    ]  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--engines", nargs="+", default=["tokenizers", "fastokens"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--megabytes", type=float, default=300)
    parser.add_argument("--peer-megabytes", type=float, default=50)
    parser.add_argument("--runs", type=int, default=0, help="of each; 0: 5, or 3 where one takes more than 60 s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
