"""What llmt does on one CUDA device: is it right, how fast is it, how much memory does it take?

    bash scripts/gpu_suite.sh [--quick] [--parts attention,train] [--out gpu_suite.json] [--budget 1800]

Needs no network, and nothing but this source tree and the packages of `llmt-train`. Every part is a process of its own
with a time limit: 8 minutes at most, 30 for all; `--quick` takes less of everything, 8 minutes for all on an H100.
`--dry` runs tiny sizes on the CPU, to try the suite itself. What is found goes to the JSON file as it is found, and to
one table at the end. What is not installed, or cannot be on this device, is `absent`, with its reason; it never counts
as passed. The exit code is 1 if any part failed.

    device     what this machine is, and its ceilings: a matrix product, a copy
    attention  every backend against fp64, forward and backward; isolation, determinism, time, memory
    train      real runs of `llmt_train.fit`: models like Llama 3 and Phi-3 of about 1e9 parameters
    peers      the same documents by transformers with padding, and by a plain loop
    liger      gradients with and without Liger's kernels, against fp64
    head       llmt's head and others: gradients against fp64, time, memory
    policies   activation checkpointing: memory and speed
    compile    torch.compile and Liger on and off: speed
"""

import argparse
import importlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gpu.record import AbsentError, Report
from gpu.runner import failed, run_parts
from gpu.table import render


class Limits(NamedTuple):
    """Seconds that a part may take, by profile."""

    quick: float
    full: float
    dry: float = 240


PARTS = {
    "device": Limits(40, 60),
    "attention": Limits(180, 480),
    "train": Limits(130, 300),
    "peers": Limits(140, 300),
    "liger": Limits(60, 120),
    "head": Limits(60, 120),
    "policies": Limits(130, 240),
    "compile": Limits(200, 400),
}
"""In the order in which they run."""

BUDGETS = Limits(480, 1800, 900)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite, or one part of it for the suite; return the exit code."""
    given = _parser().parse_args(arguments)
    profile = "dry" if given.dry else "quick" if given.quick else "full"
    if given.child:
        run_part(given.child, profile, given.cases)
        return 0
    parts = given.parts.split(",") if given.parts else list(PARTS)
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        print(f"error: --parts: no part {', '.join(unknown)}; wanted of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    limits = {name: getattr(PARTS[name], profile) for name in parts}
    about = {
        "profile": profile,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
    }
    found = run_parts(limits, _command(profile), given.out, about, given.budget or getattr(BUDGETS, profile))
    print(render(found))
    return 1 if failed(found) else 0


def run_part(name: str, profile: str, cases: Path) -> None:
    """Run one part in this process; its cases go to a file."""
    report = Report(cases)
    try:
        importlib.import_module(f"gpu.{name}_part").run(report, profile)
    except AbsentError as missing:
        report.absent(name, str(missing))


def _command(profile: str):
    profile_flag = [] if profile == "full" else [f"--{profile}"]
    return lambda name, cases: [
        sys.executable, "-u", "-m", "gpu.suite", *profile_flag, "--child", name, "--cases", str(cases)
    ]  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_suite.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="less of everything")
    size.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--parts", help="of these alone, in this order: attention,train")
    parser.add_argument("--out", type=Path, default=Path("gpu_suite.json"), help="JSON file (default: %(default)s)")
    parser.add_argument("--budget", type=float, help="seconds for all parts together")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
