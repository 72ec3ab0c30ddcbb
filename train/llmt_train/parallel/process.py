"""This process's place among those that train together, and the group in which they meet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from llmt_shared.errors import ConfigError, LlmtError, Stopped
from llmt_train.config import ParallelConfig
from llmt_train.parallel.board import Board, board_of, open_store
from llmt_train.parallel.failures import Fate, RankError, ending_of, gather_fates, verdict
from llmt_train.parallel.heartbeat import PERIOD, Heartbeat
from llmt_train.parallel.started import Started, host_name, how_started, is_launched, name_of, wants_traceback
from llmt_train.parallel.voice import one_voice

_PATIENCE = 3 * PERIOD
"""Seconds after a failure in which the other ranks say how they ended, or that they live."""
_PARTING = 30.0
"""Seconds for which a rank that is done waits until the others are."""


def _for_nobody(step: int) -> None:
    """Tell nobody which step is done."""


@dataclass(frozen=True)
class Process:
    """One of the processes that train together; it drives one device."""

    rank: int
    world: int
    local_rank: int
    """Among those of this machine."""
    local_world: int
    device: torch.device
    beat: Callable[[int], None] = _for_nobody
    """Tells the other ranks which step is done; costs nothing."""


@contextmanager
def joined(config: ParallelConfig) -> Iterator[Process]:
    """Be one of the processes that train together, while this is entered; uses a process group that is there already.

    What `llmt-train fit`, torchrun or srun started meet; a process alone is a group of one, without a port. Rank 0
    alone speaks. An error is told to the other ranks, and what leaves instead of it says which rank is to blame; where
    another process tells the user, its `is_told` is set.

    Raises:
        ConfigError: processes and devices do not fit together.
        RankError: a rank did not come, died, hung or failed.
    """
    if dist.is_initialized():
        yield _process_of_group()
        return
    started = how_started()
    device = _take_device(started)
    if started is None or started.world == 1:
        _begin(device, HashStore(), 0, 1, config.timeout)
        try:
            yield Process(0, 1, 0, 1, device)
        finally:
            dist.destroy_process_group()
        return
    with _together(started, device, config.timeout) as process:
        yield process


def _process_of_group() -> Process:
    """The place in a group that somebody else began."""
    started, rank, world = how_started(), dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if started is None:
        return Process(rank, world, rank, world, device)
    return Process(rank, world, started.local_rank, started.local_world or world, device)


def _take_device(started: Started | None) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count, local_rank = torch.cuda.device_count(), started.local_rank if started is not None else 0
    index = 0 if count == 1 else local_rank  # a scheduler may show each process its own GPU only
    if index >= count:
        assert started is not None
        raise ConfigError(
            f"{name_of(started.rank, host_name())}: {local_rank + 1} processes or more were started here, but there "
            f"are {count} GPUs; start one process per GPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _begin(device: torch.device, store: Store, rank: int, world: int, timeout: int) -> None:
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",  # offloaded gradients lie in the host's memory
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )


@contextmanager
def _together(started: Started, device: torch.device, timeout: int) -> Iterator[Process]:
    """Meet the others and part from them."""
    rank, world = started.rank, started.world
    store, board = _open_board(started, timeout)
    hosts = {rank: host_name()}
    try:
        hosts = _meet(board, rank, timeout)
        local_world = started.local_world or list(hosts.values()).count(hosts[rank])
        _check_that_all_gpus_work(started, local_world)
        _begin(device, PrefixStore("group", store), rank, world, timeout)
        with one_voice(board, rank, hosts[rank]), Heartbeat(board, rank, hosts, timeout) as heartbeat:
            yield Process(rank, world, started.local_rank, local_world, device, heartbeat.beat)
    except Exception as error:
        if (found := _explained(error, board, started, hosts, timeout)) is not error:
            raise found from error
        raise
    board.tell_ending(rank, ending_of(None))
    if board.wait_for("ending", range(world), _PARTING):
        _destroy()
    _leave(board, started)


def _open_board(started: Started, timeout: int) -> tuple[Store, Board]:
    try:
        store = open_store(started, timeout, keeps=started.rank == 0 and not started.has_store)
        return store, board_of(open_store(started, timeout, keeps=False), started.world)
    except RuntimeError as error:
        name = name_of(started.rank, host_name())
        failure = RankError(
            f"{name}: nothing answers at {started.address}:{started.port}, where the ranks meet, within {timeout} s "
            f"(parallel.timeout): {str(error).splitlines()[0]}"
        )
        failure.is_told = started.local_rank > 0
        raise failure from error


def _meet(board: Board, rank: int, timeout: int) -> dict[int, str]:
    """Return the machine of every rank."""
    board.tell_host(rank, host_name())
    if not board.wait_for("host", range(board.world), timeout):
        missing = sorted(set(range(board.world)) - set(board.hosts()))
        names = ", ".join(str(rank) for rank in missing)
        raise RankError(
            f"rank{'s' if len(missing) > 1 else ''} {names} of {board.world} did not come within {timeout} s "
            "(parallel.timeout)"
        )
    return board.hosts()


def _check_that_all_gpus_work(started: Started, local_world: int) -> None:
    count = torch.cuda.device_count()
    if started.by_slurm and count > 1 and count != local_world:
        raise ConfigError(
            f"{name_of(started.rank, host_name())}: srun started {local_world} processes here, but there are {count} "
            f"GPUs; start one per GPU: --ntasks-per-node={count}"
        )


def _explained(error: Exception, board: Board, started: Started, hosts: dict[int, str], timeout: int) -> LlmtError:
    """Tell the others how this rank ends; return what this one raises."""
    ending = ending_of(error, whole=wants_traceback())
    own = error if isinstance(error, LlmtError) else RankError(ending.text)
    patience = _PARTING if isinstance(error, Stopped) else _PATIENCE
    try:
        board.tell_ending(started.rank, ending)
        if is_launched():
            board.wait_for("ending", range(board.world), patience if isinstance(error, Stopped) else 0)
            own.is_told = True
            return own
        found = _found_out(board, started, gather_fates(board, hosts, patience), timeout)
    except RuntimeError:  # rank 0 kept the store, and has gone
        fates = [Fate(0, hosts.get(0, "?"), signal=0), Fate(started.rank, hosts[started.rank], ending=ending)]
        found = verdict(fates, timeout)
        found.is_told = any(rank < started.rank and hosts[rank] == hosts[started.rank] for rank in hosts if rank > 0)
    if own.exit_code != found.exit_code:
        return found
    own.args, own.is_told = found.args, found.is_told
    return own


def _found_out(board: Board, started: Started, fates: list[Fate], timeout: int) -> LlmtError:
    """What to tell the user, by the lowest rank that can; part from the others."""
    found = verdict(fates, timeout)
    lowest = min(fate.rank for fate in fates if fate.ending is not None)
    found.is_told = started.rank != lowest or not board.is_first_to("speak")
    if all(fate.ending is not None and fate.ending.kind in ("told", "done") for fate in fates):
        _destroy()
    _leave(board, started)
    return found


def _leave(board: Board, started: Started) -> None:
    """Part; who keeps the store stays until the others have read what they want."""
    board.tell_left(started.rank)
    if started.rank == 0 and not started.has_store:
        board.wait_for("left", board.endings(), _PATIENCE)


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
