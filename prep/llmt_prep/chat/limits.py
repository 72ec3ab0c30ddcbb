"""What one rendering of a template may spend, and what a value may weigh.

A template comes with a tokenizer from somewhere, so it may loop for ever or double a string forty times. It is stopped
by counting, not by a clock: a record is refused on every machine or on none. The clock only ends what counting does
not see, after a time that no template in use comes near.
"""

import time
from typing import Any

from jinja2.exceptions import TemplateRuntimeError

OUTPUT_BASE = 65_536
OUTPUT_FACTOR = 16
"""The text of a conversation of n characters has at most OUTPUT_FACTOR * n + OUTPUT_BASE."""

STEPS_BASE = 10_000_000
STEPS_FACTOR = 64
"""The template of a conversation of n characters is evaluated in at most STEPS_FACTOR * n + STEPS_BASE steps: parts of
its source, at 20 to 100 ns each. Templates in use take about 500 for a message."""

MAX_SECONDS = 60.0
"""CPU time of the thread."""

_MADE_FACTOR = 8
"""Characters that all filters, calls and outputs together may make, in longest texts."""

_STEPS_BETWEEN_LOOKS = 1_000_000


class LimitError(TemplateRuntimeError):
    """A template that does too much."""


class Meter:
    """Counts down what the rendering that runs now may still spend; one thread at a time."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, input_size: int) -> None:
        """Begin a rendering of an input of so many characters."""
        self.max_size = OUTPUT_FACTOR * input_size + OUTPUT_BASE
        self._characters = _MADE_FACTOR * self.max_size
        self.max_steps = self._steps = STEPS_FACTOR * input_size + STEPS_BASE
        self._next_look = self._steps - _STEPS_BETWEEN_LOOKS
        self._deadline: float | None = None

    def spend(self, steps: int, characters: int = 0) -> None:
        """Count steps and characters made.

        Raises:
            LimitError: there were too many of one, or it took too long.
        """
        self._steps -= steps
        self._characters -= characters
        if self._steps < self._next_look or self._characters < 0:
            self._look()

    def _look(self) -> None:
        if self._characters < 0:
            raise LimitError(f"it makes too much text for its input: the text may have {self.max_size} characters")
        if self._steps < 0:
            raise LimitError(f"it does not come to an end: more than {self.max_steps} steps")
        self._next_look = max(0, self._steps - _STEPS_BETWEEN_LOOKS)
        now = time.thread_time()
        self._deadline = self._deadline or now + MAX_SECONDS
        if now > self._deadline:
            raise LimitError(f"it does not come to an end: more than {MAX_SECONDS:.0f} seconds")

    def require_size(self, size: int) -> None:
        """Raise LimitError where something that is about to be made would be longer than a text may be."""
        if size > self.max_size:
            raise LimitError(f"it makes a value of {size} characters or items; at most {self.max_size} are allowed")

    def require_weight(self, value: Any) -> Any:
        """Return a value that, written out, is no longer than a text may be."""
        self.weigh(value)
        return value

    def weigh(self, value: Any) -> int:
        """Return about how long a value is when it is written out.

        What is inside several times counts several times: lists that hold a list twice, forty levels deep, are small
        in memory and endless as text.

        Raises:
            LimitError: it is longer than a text may be.
        """
        if isinstance(value, str):
            self.require_size(len(value))
            return len(value)
        return self._weigh_parts(value) if isinstance(value, (dict, list, tuple)) else 1

    def _weigh_parts(self, value: Any) -> int:
        num_parts, weight, stack = 0, 0, [value]
        while stack:
            part = stack.pop()
            num_parts += 1
            if isinstance(part, str):
                weight += len(part)
            elif isinstance(part, dict):
                stack.extend(part)
                stack.extend(part.values())
            elif isinstance(part, (list, tuple)):
                stack.extend(part)
            self.require_size(num_parts + weight + len(stack))
        self.spend(num_parts)
        return num_parts + weight
