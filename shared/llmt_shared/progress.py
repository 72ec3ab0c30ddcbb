"""Progress of long work on stderr: a bar on a terminal, plain lines otherwise."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS_BETWEEN_LINES = 10.0


_keepers: list[Callable[[str], None]] = []
_silences: list[None] = []


def say(message: str) -> None:
    """Write one line of the log; a log that nobody reads any more (`2>&1 | head`) ends no run."""
    if is_silent():
        return
    keep(message)
    try:
        print(message, file=sys.stderr, flush=True)  # noqa: T201
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def keep(message: str) -> None:
    """Hand a line to whoever keeps the log, without showing it."""
    if is_silent():
        return
    for keeper in _keepers:
        keeper(message)


def is_silent() -> bool:
    """Return whether another process speaks for this one."""
    return bool(_silences)


@contextmanager
def silent() -> Iterator[None]:
    """Say, show and keep nothing while this is entered: another process does the same and speaks for all."""
    _silences.append(None)
    try:
        yield
    finally:
        _silences.pop()


@contextmanager
def kept_by(keeper: Callable[[str], None]) -> Iterator[None]:
    """Hand every line of the log to ``keeper`` too, while this is entered."""
    _keepers.append(keeper)
    try:
        yield
    finally:
        _keepers.remove(keeper)


@contextmanager
def stage(name: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Show one stage of a run; the function it gives is told how much more is done.

    Args:
        name: what is done.
        total: of all that ``advance`` will be told; 0 shows nothing.
        unit: ``bytes`` shows sizes and rates as such.
    """
    if total == 0 or is_silent():
        yield lambda amount: None
    elif sys.stderr.isatty():
        with _bar(name, total, unit) as advance:
            yield advance
    else:
        with _lines(name, total) as advance:
            yield advance


@contextmanager
def _bar(name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich import progress
    from rich.console import Console

    amount = (
        (progress.DownloadColumn(), progress.TransferSpeedColumn())
        if unit == "bytes"
        else (progress.MofNCompleteColumn(),)
    )
    columns = (progress.TextColumn("{task.description:>12}"), progress.BarColumn(), *amount)
    with progress.Progress(*columns, progress.TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def _lines(name: str, total: int) -> Iterator[Callable[[int], None]]:
    started = shown = time.monotonic()
    done = 0

    def advance(amount: int) -> None:
        nonlocal done, shown
        done += amount
        if time.monotonic() - shown > _SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            say(f"{name}: {done / total:.0%} after {shown - started:.0f} s")

    yield advance
    say(f"{name}: done in {time.monotonic() - started:.1f} s")
