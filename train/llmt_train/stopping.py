"""How a run is asked to stop: SIGTERM or Ctrl-C finish the current step and save; a second Ctrl-C leaves at once.

On many devices a signal may reach some ranks only, or some of them a step later: they agree after every step.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from llmt_shared.progress import is_silent
from llmt_train.parallel.reduction import largest


class StopRequest:
    """Hears SIGTERM and SIGINT while it is entered; `signal_name` is the first one heard or agreed on, or ``None``."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._has_heard = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Remember the handlers that are there, and listen."""
        if threading.current_thread() is threading.main_thread():  # Python hears signals nowhere else
            self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals (back): a trainer installs handlers of its own when it starts."""
        for number in self._before:
            signal.signal(number, self._hear)

    def agreed(self) -> bool:
        """Return whether any rank was asked to stop, the same on all; all call it after the same step.

        From then on `signal_name` is the same on all of them too.
        """
        heard = largest(signal.Signals[self.signal_name] if self.signal_name is not None else 0)
        if heard:
            self.signal_name = signal.Signals(heard).name
        return heard != 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._has_heard and number == signal.SIGINT:
            _write("interrupted; nothing more is saved")
            os._exit(130)  # a library between us and the caller may turn an exception into another exit code
        self._has_heard = True  # not what another rank has heard: Ctrl-C may reach this one later
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            _write(f"{self.signal_name}: finishing this step and saving; Ctrl-C leaves at once without saving")


def _write(message: str) -> None:
    """Write to stderr from a signal handler: `print` may have been interrupted in the middle of its own work."""
    if not is_silent():
        os.write(2, f"\n{message}\n".encode())
