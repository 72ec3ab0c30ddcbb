"""A command whose workers add up numbers; one comes to grief: `python toy_run.py HOW TIMEOUT [RANK]`."""

import os
import signal
import sys
import time
import warnings

import torch
import torch.distributed as dist

from llmt_shared.command import run
from llmt_shared.errors import ConfigError, Stopped
from llmt_shared.progress import say
from llmt_train.config import ParallelConfig
from llmt_train.parallel import heartbeat
from llmt_train.parallel import process as process_module
from llmt_train.parallel.board import open_store
from llmt_train.parallel.launch import end_with_launcher, launch
from llmt_train.parallel.process import Process, joined
from llmt_train.parallel.started import end_at_once, how_started
from llmt_train.stopping import StopRequest

LAST_STEP = 400
heartbeat.PERIOD = 0.2
process_module._PATIENCE = 3.0


def main() -> None:
    how, timeout = sys.argv[1], int(sys.argv[2])
    if how_started() is None:
        launch([sys.executable, *sys.argv], 2, timeout=timeout, grace=3)
        return
    end_with_launcher()
    wait_for_both()
    torch.set_num_threads(1)
    with StopRequest() as stop, joined(ParallelConfig(timeout=timeout)) as process:
        work(how, process, stop)
    if process.rank == 0:
        print("the result")


def wait_for_both() -> None:
    """Until both have loaded torch: the time that they have to meet afterwards may be short."""
    started = how_started()
    if started is not None and started.has_store:
        store = open_store(started, 60, keeps=False)
        store.set(f"loaded/{started.rank}", "")
        store.wait(["loaded/0", "loaded/1"])


def work(how: str, process: Process, stop: StopRequest) -> None:
    say(f"begin with {process.world}")
    warnings.warn("alike", stacklevel=1)
    total = torch.zeros(1)
    for step in range(1, LAST_STEP):
        if process.rank == int((sys.argv[3:] or ["1"])[0]) and step == 4:
            come_to_grief(how)
        if how == "config" and step == 4:
            raise ConfigError("a mistake of all")
        dist.all_reduce(total)
        process.beat(step)
        if how == "stop":
            say(f"pid {os.getpid()} step {step}")
            time.sleep(0.02)
        elif how == "well" and step == 9:
            return
        if stop.agreed():
            raise Stopped(f"saved at step {step}")


def come_to_grief(how: str) -> None:
    if how == "kill":
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "sleep":
        time.sleep(60)
    if how == "raise":
        raise ArithmeticError("a bug of one")
    if how == "leave":
        print("what it wrote last", file=sys.stderr)
        os._exit(7)


if __name__ == "__main__":
    try:
        run(main, "train")
    except BaseException as error:
        end_at_once(error)
        raise
