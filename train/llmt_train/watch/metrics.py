"""metrics.jsonl: one JSON object per logged step or evaluation, one clean curve however often a run was resumed.

So is every file of a run that holds lines of steps.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from llmt_shared import durable

NAME = "metrics.jsonl"


class MetricsFile:
    """An open metrics.jsonl (or another file of that kind) that a run resumed after ``last_step`` steps appends to.

    What lies beyond that step was written by a run that did not live to save it, and is cut off. One rank writes; on
    the others nothing is.
    """

    def __init__(self, directory: Path, last_step: int, name: str = NAME, *, is_written: bool = True) -> None:
        self._file: TextIO | None = None
        if not is_written:
            return
        path = directory / name
        kept = [json.dumps(record) for record in read_metrics(directory, name) if record["step"] <= last_step]
        durable.write(path, "".join(f"{line}\n" for line in kept if last_step > 0))
        self._file = path.open("a")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line, at once visible to readers."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Put all lines on the disk: a checkpoint must never be ahead of the curve that leads to it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_metrics(directory: Path, name: str = NAME) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl, up to the first line that is none, as a kill may have cut it."""
    try:
        lines = (directory / name).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records
