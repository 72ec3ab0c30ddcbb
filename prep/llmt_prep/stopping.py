"""How a run stops early with its state saved: a signal, or a disk that is full. Both end in exit code 4."""

import errno
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from llmt_shared import durable
from llmt_shared.errors import ConfigError, Stopped

RESUME = "nothing is lost: run the same command again to go on"
START_AGAIN = "nothing was written: run the same command again"


class _Signal(BaseException):
    """A signal, on its way up; no `except Exception` of a library or of ours may take it for a failure of its own."""


@contextmanager
def stoppable(way_out: str = RESUME) -> Iterator[None]:
    """Turn SIGTERM, the first SIGINT and a full disk into `Stopped`; a second SIGINT ends the process with 130.

    Args:
        way_out: what the message says of the state and of how to go on.

    Raises:
        ConfigError: a place to write to is not this user's, or is read-only.
        Stopped: as above.
    """
    before: dict[int, Any] = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        try:
            yield
        except OSError as error:
            raise _explained(error, way_out) from None
        finally:
            _restore(before)
    except _Signal as stop:
        _restore(before)  # again: the signal may have come between the two
        raise Stopped(f"by {stop}; {way_out}") from None


def _explained(error: OSError, way_out: str) -> Exception:
    """What a user can do about an error of the system, or the error itself."""
    if durable.is_full_disk(error):
        where = f" while writing {error.filename}" if error.filename else ""
        return Stopped(f"no room left on the disk{where} ({error.strerror}); make room; {way_out}")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(f"{error.filename}: {error.strerror}; choose another `output` or `cache`")
    return error


def _restore(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what now puts things away is not to be interrupted again
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    raise _Signal(signal.Signals(number).name)
