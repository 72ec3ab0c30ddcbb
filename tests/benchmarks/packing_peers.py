"""Packing lengths alone: ours against TRL's and OLMo-core's best-fit-decreasing and a copy, and how full rows get.

usage: python tests/benchmarks/packing_peers.py WORK_FOLDER [--peers trl olmo] [--sizes 10000000 100000000] [--runs 5]

Environments of the peers and lengths go below WORK_FOLDER (400 MB for 1e8 lengths). All run on core 0.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jobs import HERE
from measure import machine, run, table
from peers.environments import PACKAGES, python_of

from llmt_prep.packing import pack

LENGTH = 4096
NUM_DOCUMENTS = 1_000_000
LOG_NORMAL = {"chat": (5.5, 0.9), "web": (6.0, 1.2), "code": (6.5, 1.5)}
"""Mean and deviation of the logarithm of a document's tokens: at L = 4096 truncation would lose 0.3, 10 and 39 %."""
ROW_LENGTHS = (2048, 4096, 8192, 16_384, 32_768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peers", nargs="*", choices=["trl", "olmo"], default=["trl", "olmo"])
    parser.add_argument("--sizes", type=int, nargs="*", default=[10**7, 10**8])
    parser.add_argument("--runs", type=int, default=5, help="of ours and of the copy; a peer has 3 at most")
    said = parser.parse_args()
    print(f"{machine()}; one core; {', '.join(PACKAGES[name][0] for name in said.peers)}\n")
    print(table(["lengths, L = 4096", "s", "rows", "rows / bound", "s / ours"], list(_against_peers(said))), "\n")
    header = ["lengths, L = 4096", "ours, s", "copy, s", "ours / copy", "bytes / document"]
    print(table(header, [_against_copy(size, said) for size in said.sizes]), "\n")
    header = ["1e6 documents", *(f"L = {length}" for length in ROW_LENGTHS)]
    print(table(header, [_fill(kind) for kind in LOG_NORMAL]))


def _against_peers(said: argparse.Namespace) -> Iterator[list[str]]:
    file = _lengths_file(NUM_DOCUMENTS, said.work)
    bound = -(-np.load(file).sum(dtype=np.int64) // LENGTH)
    ours = _packed("llmt", sys.executable, file, said.runs)
    everyone = {"ours": ours}
    for peer in said.peers:
        everyone[peer] = _packed(peer, python_of(peer, said.work / "environments"), file, min(3, said.runs))
    for name, packed in everyone.items():
        yield [f"1e6, {name}", f"{packed['seconds']:.4f}", f"{packed['rows']:,}", f"{packed['rows'] / bound:.5f}",
               f"{packed['seconds'] / ours['seconds']:.0f}"]  # fmt: skip


def _against_copy(size: int, said: argparse.Namespace) -> list[str]:
    ours = _packed("llmt", sys.executable, _lengths_file(size, said.work), said.runs)
    seconds, copied = ours["seconds"], ours["copy_seconds"]
    ratio, num_bytes = f"{seconds / copied:.1f}", f"{ours['bytes_per_document']:.1f}"
    return [f"{size:.0e}", f"{seconds:.3f}", f"{copied:.3f}", ratio, num_bytes]


def _packed(name: str, python: str | Path, file: Path, runs: int) -> dict[str, Any]:
    command: Sequence[str | Path] = [python, HERE / "peers" / f"bfd_{name}.py", file, str(LENGTH), str(runs)]
    return json.loads(run(command, (0,), file.parent).stdout)


def _fill(kind: str) -> list[str]:
    """Fill of all rows, and rows as a multiple of the fewest that could hold the tokens; windows as they come."""
    lengths, cells = lengths_like(kind, NUM_DOCUMENTS), []
    tokens = int(lengths.sum(dtype=np.int64))
    for length in ROW_LENGTHS:
        rows = len(pack(lengths, length, "split").offsets) - 1
        cells.append(f"{tokens / (rows * length):.4%}, {rows / -(-tokens // length):.5f}")
    return [f"{kind}: fill, rows / bound", *cells]


def lengths_like(kind: str, num_documents: int, seed: int = 0) -> np.ndarray:
    """Tokens of documents of a kind: [num_documents] int32."""
    return np.random.default_rng(seed).lognormal(*LOG_NORMAL[kind], num_documents).astype(np.int32) + 1


def _lengths_file(num_documents: int, work: Path) -> Path:
    """Lengths like those of web text, truncated at L because the peers refuse longer ones or truncate them."""
    path = work.absolute() / "lengths" / f"{num_documents}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        pieces = [lengths_like("web", NUM_DOCUMENTS, seed) for seed in range(num_documents // NUM_DOCUMENTS)]
        np.save(path, np.minimum(np.concatenate(pieces), LENGTH))
    return path


if __name__ == "__main__":
    main()
