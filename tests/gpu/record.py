"""What a part of the suite finds, written down the moment it is found: one JSON object a line.

A case is `ok` (with what was measured), `FAILED` (with why) or `absent` (what it needs is not here): never passed
because it did not run.
"""

import gc
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OK, FAILED, ABSENT = "ok", "FAILED", "absent"


class AbsentError(Exception):
    """What a case needs is not on this machine; the message says what."""


class WrongError(Exception):
    """A result is not what it must be."""


class Report:
    """The cases of one part, appended to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def case(self, name: str) -> Iterator[dict[str, Any]]:
        """Run one case; nothing that it raises ends the part.

        Yields:
            Where the case puts what it measures.
        """
        values: dict[str, Any] = {}
        try:
            yield values
        except AbsentError as missing:
            self._write(name, ABSENT, values, str(missing))
        except Exception as error:
            traceback.print_exc()
            self._write(name, FAILED, values, f"{type(error).__name__}: {_first_lines(error)}")
        else:
            self._write(name, OK, values, "")
        finally:
            free_memory()

    def absent(self, name: str, reason: str) -> None:
        """Say what a case needs that is not here."""
        self._write(name, ABSENT, {}, reason)

    def _write(self, name: str, status: str, values: dict[str, Any], reason: str) -> None:
        line = json.dumps({"case": name, "status": status, "values": values, "reason": reason})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, file=sys.stderr, flush=True)


def require(holds: bool, message: str) -> None:
    """Fail the case unless something holds.

    Raises:
        WrongError: it does not.
    """
    if not holds:
        raise WrongError(message)


def read_cases(path: Path) -> list[dict[str, Any]]:
    """Return the cases written so far; a line that is being written is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def free_memory() -> None:
    """Give back what the case before held, so that the next one's peak is its own."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _first_lines(error: Exception, characters: int = 600) -> str:
    return str(error).strip()[:characters]
