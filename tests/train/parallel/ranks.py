"""Some processes that do something together over gloo, for tests of what runs on many devices."""

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_PATIENCE = 240
"""Seconds."""


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function of a module in ``world`` processes with a process group; return what each rank returned.

    A failure of any rank is an AssertionError that holds its traceback; of one that gave no answer, where it was and
    what it wrote to stderr. Where a signal ended one, and others failed only for want of it, all is done once more,
    with a warning that pytest shows: a torch process ended so once, and left nothing to learn from. What is wrong in
    the function ends it again.
    """
    outcome = _outcome(world, function, arguments)
    if outcome.killed and all("gloo/transport" in text for text in outcome.failures):
        warnings.warn("\n".join(["a signal ended a rank", *outcome.killed]), stacklevel=2)
        outcome = _outcome(world, function, arguments)
    messages = outcome.failures + outcome.killed
    assert not messages, "\n".join(messages)
    return [pickle.loads(outcome.answers[rank]) for rank in range(world)]


class _Outcome(NamedTuple):
    """What each rank gave: one of these."""

    answers: dict[int, bytes]
    failures: list[str]
    """Tracebacks, and last words of those that gave no answer."""
    killed: list[str]
    """Last words of those that a signal ended."""


def _outcome(world: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Outcome:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmt_train.fit"])
    with tempfile.TemporaryDirectory() as folder:
        queue, is_over = context.SimpleQueue(), context.Event()
        processes = [
            context.Process(target=_run, args=(rank, world, folder, queue, is_over, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for rank, process in enumerate(processes):
            (Path(folder) / str(rank)).touch()
            process.start()
        found = _wait(processes, queue)
        failures = [f"rank {rank}:\n{text}" for rank, (is_right, text) in sorted(found.items()) if not is_right]
        killed: list[str] = []
        for rank in sorted(set(range(world)) - found.keys()):
            code = processes[rank].exitcode
            (killed if code is not None and code < 0 else failures).append(_last_words(Path(folder), rank, code))
        is_over.set()
        for process in processes:
            if len(found) < world:
                process.kill()
            process.join()
    answers = {rank: content for rank, (is_right, content) in found.items() if is_right}
    return _Outcome(answers, failures, killed)


def _wait(processes: list[Any], queue: Any) -> dict[int, tuple[bool, Any]]:
    """Return what ranks gave in time: whether it is an answer, and the answer or a traceback."""
    found: dict[int, tuple[bool, Any]] = {}
    end = time.monotonic() + _PATIENCE
    while len(found) < len(processes) and time.monotonic() < end:
        are_alive = any(process.is_alive() for process in processes)  # asked first: the last words come after
        while not queue.empty():
            found |= [queue.get()]
        if not are_alive:
            break
        time.sleep(0.01)
    return found


def _last_words(folder: Path, rank: int, code: int | None) -> str:
    end = "gave no answer in time" if code is None else f"ended with {code} and no answer"
    return f"rank {rank} {end}:\n{(folder / str(rank)).read_text(errors='replace')[-4000:]}"


def _run(
    rank: int, world: int, folder: str, queue: Any, is_over: Any, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(Path(folder) / str(rank), os.O_WRONLY), 2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(_PATIENCE - 10)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        # Pickled here: a queue would hand tensors over in shared memory, which ends with this process.
        queue.put((rank, (True, pickle.dumps(function(*arguments)))))
    except BaseException:
        queue.put((rank, (False, traceback.format_exc())))
        os._exit(1)  # the others may wait in a collective for ever; nothing here is worth a clean end
    is_over.wait(_PATIENCE)  # another may still be connecting to this one, where the function sends nothing
    dist.destroy_process_group()
