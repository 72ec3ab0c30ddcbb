"""What a person sees of a running training, on stderr: a bar on a terminal, a plain line now and then otherwise."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 5.0


class Reporter:
    """Shows steps and evaluations; on a terminal it owns the bar and must be closed."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total = total_steps
        self._first = first_step
        self._started = time.monotonic()
        self._last_line = float("-inf")
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar = _start_bar(self._console, total_steps, first_step) if self._console.is_terminal else None

    def step(self, record: Mapping[str, Any]) -> None:
        """Show one step's metrics: the line of metrics.jsonl."""
        text = _describe(record)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=record["step"], text=text)
            return
        now = time.monotonic()
        is_last = record["step"] == self._total
        if is_last or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._print(f"step {record['step']}/{self._total}  {text}  ETA {self._remaining(record['step'], now)}")

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Show one evaluation: the line of metrics.jsonl."""
        result = record["eval"]
        parts = [f"{name} {source['loss']:.4f}" for name, source in result["sources"].items()]
        self._print(f"step {record['step']}/{self._total}  held out: loss {result['loss']:.4f}  ({', '.join(parts)})")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _remaining(self, step: int, now: float) -> str:
        seconds = (now - self._started) / max(1, step - self._first) * (self._total - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours:.0f}:{minutes:02.0f}:{seconds:02.0f}"


def _start_bar(console: Console, total_steps: int, first_step: int) -> Progress:
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"), TextColumn("ETA"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console)
    bar.add_task("fit", total=total_steps, completed=first_step, text="")
    bar.start()
    return bar


def _describe(record: Mapping[str, Any]) -> str:
    speed = record["tokens_per_s"]
    return f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {speed:,.0f} tokens/s"
