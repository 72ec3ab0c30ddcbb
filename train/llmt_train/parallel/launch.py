"""`llmt-train fit` alone: one worker process for each device of this machine, watched until the last has ended.

The workers run the same command. `torch.distributed.elastic` could start them, but not end them as we want: when one
ends with any code but 0 (4 too: stopped and saved) it sends SIGTERM to the others, and kills them after 30 s; a signal
to itself ends them in the same way and loses their exit codes; and it starts a second copy of nothing that we need here
(rendezvous, restarts). So this is a supervisor of our own. It keeps the store in which the ranks meet and tell how they
fare, which outlives them, so that what killed one can be told.
"""

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from llmt_shared.errors import ConfigError, FormatError, Stopped
from llmt_shared.progress import say
from llmt_train.config import ParallelConfig, RunConfig
from llmt_train.parallel.board import Board, Ending, board_of
from llmt_train.parallel.failures import Fate, RankError, verdict
from llmt_train.parallel.layout import layout_of
from llmt_train.parallel.started import LAUNCHER, host_name, how_started, is_launched, wants_traceback
from llmt_train.watch.runlog import add_line

GRACE = 15.0
"""Seconds that the other workers have to end after the first that failed."""
_POLL = 0.05
_KILLED = 5.0
"""Seconds that the system has to end a killed process."""
_LAST_LINES = 20
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


def launched(config: RunConfig) -> bool:
    """Run this command in a process for each local device; False where this very process is to run it.

    What no worker could write to the run's log is written there.

    Raises:
        ConfigError: `parallel` does not fit the devices of this machine.
        LlmtError: what ended the workers, once for all of them.
    """
    if how_started() is not None:
        return False
    if (number := local_processes(config.parallel, torch.cuda.device_count())) == 1:
        return False
    try:
        launch(this_command(), number, timeout=config.parallel.timeout)
    except RankError as error:
        add_line(config.output, f"error: {error}")
        raise
    return True


def local_processes(config: ParallelConfig, num_gpus: int) -> int:
    """Return how many processes one machine is to run: one per GPU; without GPUs what is said, where auto is 1.

    Raises:
        ConfigError: GPUs would be idle, or are missing.
    """
    inner = config.cp * config.tp
    if num_gpus == 0:
        return layout_of(config, inner * (1 if config.dp == "auto" else config.dp)).world
    if config.dp != "auto" and config.dp * inner < num_gpus:
        wanted = config.dp * inner
        raise ConfigError(
            f"parallel: dp {config.dp} x cp {config.cp} x tp {config.tp} is {wanted} process"
            f"{'es' if wanted > 1 else ''}, but this machine has {num_gpus} GPUs; wanted `dp: auto`, or "
            f"CUDA_VISIBLE_DEVICES={','.join(map(str, range(wanted)))} in the environment to use only some"
        )
    return layout_of(config, num_gpus).world


def this_command() -> list[str]:
    """Return the command line that runs this one again, with the same import path."""
    keeps_folder = sys.path[:1] in ([""], [os.getcwd()])  # started with -m; a console script's path has no such entry
    return [sys.executable, *([] if keeps_folder else ["-P"]), "-m", "llmt_train", *sys.argv[1:]]


def end_with_launcher() -> None:
    """In a worker: be asked to stop when the launcher dies, so that no run goes on that nobody watches."""
    if not is_launched() or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ[LAUNCHER]):  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class Worker:
    """One process."""

    rank: int
    process: subprocess.Popen[bytes]
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))
    """Of its stderr; none of rank 0, whose stderr is ours."""
    relay: threading.Thread | None = None
    """Reads its stderr."""
    is_given_up: bool = False
    """Whether we killed it."""


def launch(command: Sequence[str], number: int, *, timeout: float, grace: float = GRACE) -> None:
    """Run a command in ``number`` processes on this machine; return when all have ended well.

    Only rank 0 writes to our stdout; what others write to stderr is shown with their rank. SIGTERM and SIGINT are
    handed on, and it is up to the workers to end.

    Args:
        command: what to run.
        number: of processes.
        timeout: seconds that a rank waits for the others; for messages.
        grace: seconds that the others have to end after one that failed; then they are killed.

    Raises:
        LlmtError: what ended the workers, in one message.
        KeyboardInterrupt: a second Ctrl-C ended them.
    """
    store, port = _keep_store()
    board = board_of(PrefixStore("llmt/0", store), number)
    shown: set[str] = set()
    with _handing_on_signals() as (workers, received):
        for rank in range(number):
            worker = _start(command, rank, number, port, shown)
            before = list(received)  # signals that came before there was anybody to hand them to
            workers.append(worker)
            for signal_number in before:
                worker.process.send_signal(signal_number)
        _watch(workers, timeout, grace)
    codes = [worker.process.returncode for worker in workers]
    if any(codes):
        _raise_failure(workers, board, received, timeout)


def _keep_store() -> tuple[Store, int]:
    """Keep the ranks' store at a port of the loopback device: nobody else can come to it."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def _start(command: Sequence[str], rank: int, number: int, port: int, shown: set[str]) -> Worker:
    process = subprocess.Popen(
        command,
        env=_environment(rank, number, port),
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=None if rank == 0 else subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in a terminal comes to us alone, and is handed on
    )
    worker = Worker(rank, process)
    if rank > 0:
        worker.relay = threading.Thread(target=_relay, args=(worker, shown), daemon=True)
        worker.relay.start()
    return worker


def _environment(rank: int, number: int, port: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // number))}
    if "lo" in (name for _, name in socket.if_nameindex()):
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may lead nowhere
    return (
        defaults
        | os.environ
        | {
            "RANK": str(rank),
            "WORLD_SIZE": str(number),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            LAUNCHER: str(os.getpid()),
            "LLMT_TRACEBACK": "1" if wants_traceback() else "0",
        }
    )


def _relay(worker: Worker, shown: set[str]) -> None:
    """Show what a worker writes to stderr, but not what others have written alike."""
    assert worker.process.stderr is not None
    with worker.process.stderr as lines:
        for raw in lines:
            line = raw.decode(errors="backslashreplace").rstrip()
            worker.last_lines.append(line)
            kind = re.sub(r"0x[0-9a-f]+|\d+", "#", line)
            if line and kind not in shown:
                shown.add(kind)
                say(f"rank {worker.rank}: {line}")


@contextmanager
def _handing_on_signals() -> Iterator[tuple[list[Worker], list[int]]]:
    """Hand signals on to the workers that are in the list given; whatever leaves this leaves no worker behind."""
    workers: list[Worker] = []
    received: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        for worker in workers:
            worker.process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in _SIGNALS}
    try:
        yield workers, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for worker in workers:
            worker.process.kill()
            if worker.relay is not None:
                worker.relay.join(1)  # a child of the worker's may keep its stderr open


def _watch(workers: list[Worker], timeout: float, grace: float) -> None:
    """Wait for the end of all; kill what does not end in time after the first that did."""
    end = math.inf
    while any(worker.process.poll() is None for worker in workers):
        codes = {worker.process.returncode for worker in workers} - {None}
        if codes:  # who is done, or stopped and saved, may be ahead of the others; who failed is not waited for
            end = min(end, time.monotonic() + grace + (timeout if codes <= {0, Stopped.exit_code} else 0))
        if time.monotonic() > end:
            for worker in workers:
                worker.is_given_up = worker.process.poll() is None
                worker.process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for ever
                    worker.process.wait(_KILLED)
            return
        time.sleep(_POLL)


def _raise_failure(workers: list[Worker], board: Board, received: list[int], timeout: float) -> None:
    codes = {worker.process.returncode for worker in workers if not worker.is_given_up}
    if 130 in codes:
        raise KeyboardInterrupt
    beats, endings = board.beats(), board.endings()
    if Stopped.exit_code not in codes and codes & {-number for number in received}:
        os.kill(os.getpid(), received[0])  # a worker was not ready for it yet: as if there were no launcher
    host = host_name()
    fates = [
        Fate(worker.rank, host, beats.get(worker.rank), _ending(worker, endings.get(worker.rank)), _signal(worker))
        for worker in workers
    ]
    raise verdict(fates, timeout)


def _ending(worker: Worker, said: Ending | None) -> Ending | None:
    """How a worker ended, in its own words if it had any; ``None`` for one that was killed before it had."""
    code = worker.process.returncode
    if said is not None and (said.code or code == 0):
        return said
    if worker.is_given_up or code < 0:
        return None
    if code == 0:
        return Ending("done", 0, "")
    lines = "\n".join(worker.last_lines)
    text = f"ended with exit code {code}" + (f"; its last lines:\n{lines}" if lines else "")
    return Ending("told" if code in (ConfigError.exit_code, FormatError.exit_code) else "failed", code, text)


def _signal(worker: Worker) -> int | None:
    return None if worker.is_given_up or worker.process.returncode >= 0 else -worker.process.returncode
