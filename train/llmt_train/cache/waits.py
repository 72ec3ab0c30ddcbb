"""How long training waits for a store, and when it is told so."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from llmt_shared.objects import ObjectPath
from llmt_shared.progress import say

_PERIOD = 60.0
"""Seconds between two looks."""
_SHARE = 0.1
"""Of the time; who waits longer is told."""


class Waits:
    """Sums of a period; the first period fills the cache, and counts from its end."""

    def __init__(self, location: ObjectPath) -> None:
        self._location = location
        self._lock = threading.Lock()
        self._since: float | None = None
        self._waited = self._bytes = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Training can do nothing else meanwhile."""
        started = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._count(started, time.monotonic())

    @contextmanager
    def fetching(self, size: int) -> Iterator[None]:
        """A file of so many bytes is on its way."""
        yield
        with self._lock:
            self._bytes += size

    def _count(self, started: float, now: float) -> None:
        if self._since is None:
            self._since, self._bytes = now, 0.0  # the first wait is for the first rows, and no fault of the store's
            return
        self._waited += now - started
        elapsed = now - self._since
        if elapsed < _PERIOD:
            return
        if self._waited > _SHARE * elapsed:
            say(
                f"{self._location}: the store is slower than training, which waited {self._waited:.0f} s of the last "
                f"{elapsed:.0f} s; {self._bytes / elapsed / 1e6:.1f} MB/s came. Read from a store that is nearer or "
                f"faster, or give a cache.size that holds the whole dataset"
            )
        self._since, self._waited, self._bytes = now, 0.0, 0.0
