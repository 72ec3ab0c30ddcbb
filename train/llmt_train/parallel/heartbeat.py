"""A thread that tells the other ranks that this one lives, how far it is and where."""

import contextlib
import sys
import sysconfig
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

from llmt_shared.progress import say
from llmt_train.parallel.board import Beat, Board
from llmt_train.parallel.failures import late

PERIOD = 2.0
"""Seconds between two beats."""
_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class Heartbeat:
    """Beats while it is entered, for the thread that enters it; `beat` says which step is done.

    Rank 0 also warns once a step that has taken half of ``timeout`` while it stood still itself, naming the ranks that
    keep it waiting: where NCCL ends a process that waited too long, no Python code runs any more to say so.
    """

    def __init__(self, board: Board, rank: int, hosts: dict[int, str], timeout: float) -> None:
        self._board, self._rank, self._hosts, self._timeout = board, rank, hosts, timeout
        self._step: int | None = None
        self._number = 0
        self._place, self._since = "", time.monotonic()
        self._warned_of: object = self
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def beat(self, step: int) -> None:
        """Say which step is done; costs nothing."""
        self._step = step

    def __enter__(self) -> "Heartbeat":
        """Begin."""
        self._watched = threading.get_ident()
        self._tell()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop beating, with a last one."""
        self._over.set()
        self._thread.join(PERIOD)
        with contextlib.suppress(RuntimeError):  # whoever keeps the store has gone
            self._tell()

    def _run(self) -> None:
        while not self._over.wait(PERIOD):
            try:
                self._tell()
                self._warn_of_late_ranks()
            except RuntimeError:
                return  # whoever keeps the store has gone; the collectives will say so

    def _tell(self) -> None:
        frame = sys._current_frames().get(self._watched)
        place = place_of(frame) if frame is not None else "?"
        now = time.monotonic()
        if place != self._place:
            self._place, self._since = place, now
        self._number += 1
        self._board.tell_beat(self._rank, Beat(self._number, self._step, self._place, now - self._since))

    def _warn_of_late_ranks(self) -> None:
        seconds = time.monotonic() - self._since
        if self._rank == 0 and seconds > self._timeout / 2 and self._warned_of != self._step:
            self._warned_of = self._step
            if (who := late(self._board.beats(), self._hosts)) is not None:
                say(f"warning: waiting for {seconds:.0f} s of at most {self._timeout:g} at {self._place}: {who}")


def place_of(frame: FrameType) -> str:
    """Return the innermost line that is no library's, and the innermost function if that is another."""
    innermost, found = frame.f_code.co_name, frame
    while found.f_back is not None and _is_of_library(found.f_code.co_filename):
        found = found.f_back
    called = f" -> {innermost}" if found is not frame else ""
    path = Path(found.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{found.f_lineno} {found.f_code.co_name}{called}"


def _is_of_library(path: str) -> bool:
    return path.startswith((*_LIBRARIES, "<frozen")) and "/llmt_" not in path
