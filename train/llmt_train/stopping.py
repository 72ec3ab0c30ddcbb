"""How a run is asked to stop: SIGTERM or Ctrl-C finish the current step and save; a second Ctrl-C leaves at once."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Hears SIGTERM and SIGINT while it is entered; `signal_name` is the first one heard, or ``None``."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal_name is not None and number == signal.SIGINT:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\ninterrupted; nothing more is saved\n")
            os._exit(130)  # a library between us and the caller may turn an exception into another exit code
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            text = f"\n{self.signal_name}: finishing this step and saving; Ctrl-C leaves at once without saving\n"
            os.write(2, text.encode())
