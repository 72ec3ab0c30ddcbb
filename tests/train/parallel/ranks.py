"""Some processes that do something together over gloo, for tests of what runs on many devices."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = 240
"""Seconds."""


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function of a module in ``world`` processes with a process group; return what each rank returned.

    A failure of any rank is an AssertionError that holds its traceback.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmt_train.fit"])
    with tempfile.TemporaryDirectory() as folder:
        queue, is_over = context.SimpleQueue(), context.Event()
        processes = [
            context.Process(target=_run, args=(rank, world, folder, queue, is_over, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        answers: dict[int, Any] = {}
        end = time.monotonic() + _PATIENCE
        while len(answers) < world and time.monotonic() < end:
            are_alive = any(process.is_alive() for process in processes)  # asked first: the last words come after
            while not queue.empty():
                answers |= [queue.get()]
            if not are_alive:
                break
            time.sleep(0.01)
        is_over.set()
        for process in processes:
            if len(answers) < world:
                process.kill()
            process.join()
    silent = dict.fromkeys(range(world), (False, "ended without an answer, or gave none in time"))
    answers = silent | answers
    failures = [f"rank {rank}:\n{text}" for rank, (is_right, text) in sorted(answers.items()) if not is_right]
    assert not failures, "\n".join(failures)
    return [pickle.loads(answers[rank][1]) for rank in range(world)]


def _run(
    rank: int, world: int, folder: str, queue: Any, is_over: Any, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
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
