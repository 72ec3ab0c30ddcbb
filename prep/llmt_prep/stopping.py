"""How a run stops early with its state saved: a signal, or a disk that is full. Both end in exit code 4."""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except _Signal as stop:
        raise Stopped(f"by {stop}; {way_out}") from None
    except OSError as error:
        where = f" while writing {error.filename}" if error.filename else ""
        if durable.is_full_disk(error):
            raise Stopped(f"no room left on the disk{where} ({error.strerror}); make room; {way_out}") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ConfigError(f"{error.filename}: {error.strerror}; choose another `output` or `cache`") from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what now puts things away is not to be interrupted again
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    raise _Signal(signal.Signals(number).name)
