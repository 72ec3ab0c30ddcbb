"""The three kinds of process that are compared: llmt-prep, a peer, and the bare engine."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from measure import Command
from peers.job import LENGTH

HERE = Path(__file__).parent
Make = Callable[[Path, Path], Command]
"""(corpus, home) -> the command that works on the one and writes below the other."""
LLMT_PREP = (sys.executable, "-m", "llmt_prep")


def pack(tokenizer: Path, engine: str, workers: int = 1) -> Callable[[Path, Path], Command]:
    """llmt-prep from JSONL to a finished dataset; output and cache lie in ``home``, so a fresh one is a first run."""

    def command(corpus: Path, home: Path) -> Command:
        mix = {
            "output": str(home / "dataset"),
            "cache": str(home / "cache"),
            "tokenizer": str(tokenizer),
            "engine": engine,
            "sequence": {"length": LENGTH},
            "sources": {"all": {"path": str(corpus)}},
        }
        (home / "mix.yaml").write_text(json.dumps(mix))
        return [*LLMT_PREP, "pack", "--mix", home / "mix.yaml", "--workers", str(workers)]

    return command


def packed(home: Path) -> dict[str, int]:
    split = json.loads((home / "dataset" / "ledger.json").read_text())["splits"]["train"]
    return {"tokens": split["in_rows"], "rows": split["rows"]}


def peer(name: str, python: Path, tokenizer: Path) -> Callable[[Path, Path], Command]:
    return lambda corpus, home: [python, _script(name), "write", corpus, tokenizer, home / "output"]


def written_by_peer(name: str, python: Path) -> Callable[[Path], dict[str, int]]:
    def count(home: Path) -> dict[str, int]:
        command = [python, _script(name), "count", home / "output"]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

    return count


def bare(tokenizer: Path, engine: str) -> Callable[[Path, Path], Command]:
    return lambda corpus, home: [sys.executable, HERE / "bare.py", engine, corpus, tokenizer]


def counted_by_bare(home: Path) -> dict[str, int]:
    """Tokens of all documents and one EOS for each."""
    counts = json.loads((home / "stdout").read_text())
    return {"tokens": counts["tokens"] + counts["documents"], "rows": 0}


def _script(name: str) -> Path:
    return HERE / "peers" / f"{name}_peer.py"
