"""How a run stops early with its state saved: a signal, or a disk that is full. Both end in exit code 4."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llmt_shared import durable
from llmt_shared.errors import Stopped

_RESUME = "nothing is lost: run the same command again to go on"


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM, the first SIGINT and a full disk into `Stopped`; a second SIGINT ends the process with 130."""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except OSError as error:
        if not durable.is_full_disk(error):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        raise Stopped(f"no room left on the disk{where} ({error.strerror}); make room; {_RESUME}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    raise Stopped(f"by {signal.Signals(number).name}; {_RESUME}")
