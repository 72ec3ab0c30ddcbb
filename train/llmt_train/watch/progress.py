"""What a person sees of a running training, on stderr: a bar on a terminal, a plain line now and then otherwise.

The plain lines are kept in the run's log either way.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmt_shared.progress import is_silent, keep, say

_SECONDS_BETWEEN_LINES = 5.0
_MEASURES = ("accuracy", "margin", "log_odds")
"""Of the objective's own: those that say most, where it has them."""
_NOTEWORTHY_WAIT = 0.05
"""Share of a step's time from which on waiting for data is shown."""
_BAR_WIDTH = 12
_BESIDE_BAR = 28  # columns of a terminal for the bar, ETA and what sets them apart
_IN_BAR = ("loss", "speed", "mfu", "wait", "lr")
"""What stands beside the bar, as far as there is room."""


class Reporter:
    """Shows steps, evaluations and notes; on a terminal it owns the bar and must be closed."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total = total_steps
        self._first = first_step
        self._started = time.monotonic()
        self._last_line = float("-inf")
        console = Console(file=sys.stderr, highlight=False, emoji=False, soft_wrap=True)
        self._bar = _start_bar(console, total_steps, first_step) if console.is_terminal and not is_silent() else None

    def step(self, record: Mapping[str, Any]) -> None:
        """Show one step's metrics: the line of metrics.jsonl."""
        parts = _describe(record)
        if self._bar is not None:
            room = self._bar.console.width - _BESIDE_BAR - 2 * len(str(self._total))
            text = _fitting([parts[name] for name in _IN_BAR if name in parts], room)
            self._bar.update(self._bar.task_ids[0], completed=record["step"], text=text)
        now = time.monotonic()
        is_last = record["step"] == self._total
        if is_last or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            line = f"{self._place(record)}  {'  '.join(parts.values())}  ETA {self._remaining(record['step'], now)}"
            (say if self._bar is None else keep)(line)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Show one evaluation: the line of metrics.jsonl."""
        result = record["eval"]
        parts = [f"{name} {source['loss']:.4f}" for name, source in result["sources"].items()]
        measures = _describe_measures(result)
        self.note(f"{self._place(record)}  held out: loss {result['loss']:.4f}{measures}  ({', '.join(parts)})")

    def note(self, text: str) -> None:
        """Show a line, above the bar where there is one. What comes from data must be escaped."""
        if self._bar is None:
            say(text)
            return
        keep(text)
        self._bar.console.print(text, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def _place(self, record: Mapping[str, Any]) -> str:
        return f"step {record['step']}/{self._total}"

    def _remaining(self, step: int, now: float) -> str:
        seconds = (now - self._started) / max(1, step - self._first) * (self._total - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours:.0f}:{minutes:02.0f}:{seconds:02.0f}"


def _start_bar(console: Console, total_steps: int, first_step: int) -> Progress:
    columns = (MofNCompleteColumn(), BarColumn(_BAR_WIDTH), TextColumn("{task.fields[text]}"), TextColumn("ETA"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console)
    bar.add_task("fit", total=total_steps, completed=first_step, text="")
    bar.start()
    return bar


def _describe(record: Mapping[str, Any]) -> dict[str, str]:
    """What is shown of a step, by what it is about."""
    parts = {
        "loss": f"loss {record['loss']:.4f}{_describe_measures(record)}",
        "lr": f"lr {record['lr']:.2e}",
        "speed": f"{record['tokens_per_s']:,.0f} tokens/s",
    }
    if "mfu" in record:
        parts["mfu"] = f"MFU {record['mfu']:.1%}"
    if record.get("data_wait", 0) >= _NOTEWORTHY_WAIT:
        parts["wait"] = f"waiting for data {record['data_wait']:.0%}"
    return parts


def _describe_measures(record: Mapping[str, Any]) -> str:
    shown = [f"  {name.replace('_', ' ')} {record[name]:.3f}" for name in _MEASURES if name in record]
    return "".join(shown)


def _fitting(parts: list[str], room: int) -> str:
    """As many of the parts, from the first on, as there are columns for; one at least."""
    while len(parts) > 1 and len("  ".join(parts)) > room:
        parts = parts[:-1]
    return "  ".join(parts)
