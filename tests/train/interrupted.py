"""Runs in processes that are killed or asked to stop, and what of their metrics may not change by it."""

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from llmt_train.callbacks import StepCallback
from llmt_train.config import RunConfig
from llmt_train.fit import fit
from llmt_train.watch.metrics import read_metrics

_OF_THE_MACHINE = {"tokens_per_s", "mfu", "tflops", "data_wait", "peak_memory"}


def curve(output: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the machine."""
    return [
        {key: value for key, value in record.items() if key not in _OF_THE_MACHINE} for record in read_metrics(output)
    ]


def interrupt(config: RunConfig, step: int, how: signal.Signals = signal.SIGKILL) -> None:
    """Run in another process and send it a signal when it has logged a step, and one that is new; it waits for it."""
    wanted = max(step, 1 + max((record["step"] for record in read_metrics(config.output)), default=-1))
    process = started(config, wanted)
    while process.is_alive() and not any(record["step"] >= wanted for record in read_metrics(config.output)):
        time.sleep(0.001)
    assert process.pid is not None
    if how == signal.SIGKILL:
        process.kill()
    else:
        process.terminate()
    process.join()
    # Python ends with 1 on the exception that says that the run was stopped.
    assert process.exitcode == (-signal.SIGKILL if how == signal.SIGKILL else 1)


def started(config: RunConfig, signalled_after: int | None = None) -> BaseProcess:
    """Run in another process, with this one's environment and number of threads.

    Args:
        config: of the run.
        signalled_after: a step after which it waits for a signal.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmt_train.fit"])
    process = context.Process(target=_fit, args=(config, signalled_after, torch.get_num_threads(), dict(os.environ)))
    process.start()
    return process


def _fit(config: RunConfig, signalled_after: int | None, num_threads: int, environment: Mapping[str, str]) -> None:
    """As in the caller, whose fork server may have begun in another test, with what was true there.

    The order of a sum, and so its last bits, depend on the number of threads.
    """
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(num_threads)
    if signalled_after is not None:
        _wait_after(signalled_after)
    fit(config)


def _wait_after(last: int) -> None:
    log = StepCallback._log

    def log_and_wait(callback: StepCallback, trainer: Any, step: int, record: dict[str, Any]) -> None:
        log(callback, trainer, step, record)
        while step >= last and callback.run.stop.signal_name is None:
            time.sleep(0.01)

    StepCallback._log = log_and_wait  # type: ignore[method-assign]
