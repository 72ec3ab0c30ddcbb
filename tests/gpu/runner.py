"""Runs the parts of the suite one after another, each a process of its own with a hard limit.

A part that hangs, is killed or breaks the device takes nothing with it but itself; what it wrote until then stays.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu.record import ABSENT, FAILED, OK, read_cases

Command = Callable[[str, Path], Sequence[str]]
"""Of a part's name and the file for its cases."""

_POLL = 0.5  # seconds


def run_parts(
    limits: Mapping[str, float], command: Command, out: Path, about: Mapping[str, Any], budget: float
) -> dict[str, Any]:
    """Run parts and return everything that they found; `out` holds what is known so far at any moment.

    Args:
        limits: seconds that each part may take, by name, in the order in which they run.
        command: starts a part.
        out: JSON file; the log of all parts lies beside it, with the ending `.log`.
        about: what else the file says.
        budget: seconds for all parts together; a part that finds less than its limit left gets what is left.
    """
    begin, found = time.monotonic(), dict(about) | {"parts": {}}
    log = out.with_suffix(".log")
    log.write_bytes(b"")
    for name, limit in limits.items():
        left = min(limit, budget - (time.monotonic() - begin))
        part = found["parts"][name] = {"status": "running", "limit": round(left, 1), "cases": []}
        if left <= 0:
            part |= {"status": FAILED, "seconds": 0.0, "reason": f"not run: the budget of {budget:g} s is spent"}
        else:
            _run(part, name, command, log, lambda: _write_json(out, found), left)
        print(f"{name}: {part['status']}, {part['seconds']:g} s {part['reason']}", file=sys.stderr, flush=True)
        _write_json(out, found)
    return found


def failed(found: Mapping[str, Any]) -> list[str]:
    """Return the parts that did not succeed."""
    return [name for name, part in found["parts"].items() if part["status"] == FAILED]


def _run(part: dict[str, Any], name: str, command: Command, log: Path, save: Callable[[], None], limit: float) -> None:
    """Run one part; fill in what it found."""
    begin, offset = time.monotonic(), log.stat().st_size
    with tempfile.TemporaryDirectory() as folder, log.open("ab") as output:
        cases = Path(folder) / "cases.jsonl"
        output.write(f"\n== {name}\n".encode())
        output.flush()
        # A session of its own: a compiler's workers end with it.
        process = subprocess.Popen(command(name, cases), stdout=output, stderr=output, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() - begin < limit:
                time.sleep(_POLL if limit > 10 else 0.05)
                part["cases"] = read_cases(cases)
                save()
        finally:
            is_over_time = process.poll() is None
            _end(process)
        part["cases"] = read_cases(cases)
    part["seconds"] = round(time.monotonic() - begin, 1)
    part["reason"] = _reason(part, process.returncode, is_over_time)
    part["status"] = FAILED if part["reason"] else _status(part["cases"])
    if process.returncode != 0:
        part["last lines"] = _last_lines(log, offset)


def _reason(part: Mapping[str, Any], returncode: int, is_over_time: bool) -> str:
    """Why a part failed; empty if it did not."""
    if is_over_time:
        return f"stopped at its limit of {part['limit']:g} s"
    if returncode != 0:
        return f"ended with code {returncode}"
    wrong = [case["case"] for case in part["cases"] if case["status"] == FAILED]
    if wrong:
        return f"{len(wrong)} of {len(part['cases'])} cases failed"
    return "" if part["cases"] else "found nothing"


def _status(cases: Sequence[Mapping[str, Any]]) -> str:
    return OK if any(case["status"] == OK for case in cases) else ABSENT


def _end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_lines(log: Path, offset: int, count: int = 12) -> list[str]:
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace").splitlines()[-count:]


def _write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Replace the file as a whole: a reader never sees half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
