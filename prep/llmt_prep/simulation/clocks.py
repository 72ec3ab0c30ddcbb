"""How fast real tasks run in workers like those of a real run: rates per core, and what starting costs apart from them.

The first task of every worker is done twice: what it takes longer than the same task later on (loading a tokenizer,
compiled loops, fresh memory) is counted as start-up.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from llmt_prep.executor import local
from llmt_shared.progress import stage

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Call(NamedTuple):
    """One task that ran; times of the machine's monotonic clock, which all processes share."""

    task: int
    """Its number."""
    result: Any
    process: int
    begin: float
    end: float
    cpu: float
    """Seconds of a processor, in all threads of the worker."""
    peak: int
    """Bytes of resident memory that the worker had at most so far."""

    @property
    def seconds(self) -> float:
        """From begin to end."""
        return self.end - self.begin


class Clocked(NamedTuple):
    """Tasks that ran in some workers at once."""

    calls: tuple[Call, ...]
    """One for each task, in their order, none of them the first of its worker."""
    spawning: float
    """Seconds from asking for workers until they begin, and from the last result until they are gone."""
    warming: float
    """Seconds that the first task of a worker takes longer than the same task later."""
    workers: int
    peak: int
    """Bytes of resident memory of the largest worker."""

    @property
    def startup(self) -> float:
        """Seconds of a stage in which nothing of its work is done."""
        return self.spawning + self.warming

    @property
    def seconds(self) -> float:
        """Of all tasks together."""
        return sum(call.seconds for call in self.calls)

    @property
    def cpu_share(self) -> float:
        """Of that time: well below 1, the tasks waited for disks or for other programs."""
        return sum(call.cpu for call in self.calls) / max(self.seconds, 1e-9)


def clocked(
    name: str, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], again: Sequence[tuple[Any, ...]]
) -> Clocked:
    """Run tasks as a stage of a real run does, after warming the workers up.

    Args:
        name: of the stage, for the progress bar.
        function: importable by name.
        tasks: arguments of each call.
        again: the first of ``tasks`` once more, one for each worker, in a form in which both can run; one worker is
            this process.
    """
    warm, started = len(again), time.monotonic()
    todo = [(function, *task) for task in (*again, *tasks)]
    calls: list[Call] = []
    with stage(f"simulate: {name}", len(todo)) as advance:
        for number, call in local(warm).run(clock, todo):
            calls.append(call._replace(task=number - warm))
            advance(1)
    gone = time.monotonic()
    calls.sort(key=lambda call: call.task)
    first, rest = calls[:warm], calls[warm:]
    slower = [max(0.0, call.seconds - later.seconds) for call, later in zip(first, rest, strict=False)]
    return Clocked(
        calls=tuple(rest),
        spawning=mean(call.begin for call in first) - started + gone - max(call.end for call in calls),
        warming=mean(slower),
        workers=warm,
        peak=max(call.peak for call in calls),
    )


def clock(function: Callable[..., Any], *arguments: Any) -> Call:
    """Call a function and say how long it took; in any process."""
    begin, cpu = time.monotonic(), time.process_time()
    result = function(*arguments)
    used = time.process_time() - cpu
    return Call(0, result, os.getpid(), begin, time.monotonic(), used, peak_bytes())


@contextmanager
def peak_of_block() -> Iterator[list[int]]:
    """Give a list that gets this process's peak of resident bytes inside the block, where the system can tell it."""
    found: list[int] = []
    with suppress(OSError):  # no Linux, or a sandbox: then it is the peak of the whole process
        _CLEAR.write_text("5")  # forgets the peak so far; see proc(5)
    yield found
    found.append(peak_bytes())


def peak_bytes() -> int:
    """Return the most resident memory that this process has had."""
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        kilobytes = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes
