"""What the ranks of a run tell each other beside their collectives: that they live, where they are, how they ended.

It goes through a store (key and value, kept by the launcher, torchrun or rank 0), so it works when collectives do not.
Nothing here waits for a key: a rank that is gone writes none.
"""

import json
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from llmt_train.parallel.started import Started

_POLL = 0.1
"""Seconds."""


class Beat(NamedTuple):
    """A sign of life."""

    number: int
    """Of this rank's beats, from 1; the clocks of machines may differ, so that nobody compares times."""
    step: int | None
    """The last one done; ``None`` before the first."""
    place: str
    """The line of code where the rank is."""
    still: float
    """Seconds since it came there."""


class Ending(NamedTuple):
    """How a rank says that it ended."""

    kind: str
    """`done`; `told`: with a message that the user can understand; `failed`: with any other error; `waiting`: because
    other ranks did not answer."""
    code: int
    """Exit code."""
    text: str


class Board:
    """One process's view of what all ranks have told."""

    def __init__(self, store: Store, world: int) -> None:
        self._store = store
        self.world = world

    def tell_host(self, rank: int, host: str) -> None:
        """Say that a rank has come."""
        self._store.set(f"host/{rank}", host)

    def hosts(self) -> dict[int, str]:
        """Return the machine of every rank that has come."""
        return {rank: text.decode() for rank, text in self._read("host").items()}

    def tell_beat(self, rank: int, beat: Beat) -> None:
        """Give a sign of life."""
        self._store.set(f"beat/{rank}", json.dumps(beat))

    def beats(self) -> dict[int, Beat]:
        """Return the last sign of life of every rank that gave one."""
        return {rank: Beat(*json.loads(text)) for rank, text in self._read("beat").items()}

    def tell_ending(self, rank: int, ending: Ending) -> None:
        """Say how a rank ends."""
        self._store.set(f"ending/{rank}", json.dumps(ending))

    def endings(self) -> dict[int, Ending]:
        """Return how the ranks ended that have said so."""
        return {rank: Ending(*json.loads(text)) for rank, text in self._read("ending").items()}

    def tell_left(self, rank: int) -> None:
        """Say that a rank looks at the board no more."""
        self._store.set(f"left/{rank}", "")

    def is_first_to(self, what: str) -> bool:
        """Return whether no rank has asked this before; one of all gets True."""
        return bool(self._store.add(f"first/{what}", 1) == 1)

    def wait_for(self, kind: str, ranks: Iterable[int], seconds: float) -> bool:
        """Wait until all these ranks have told their `host`, `ending` or `left`; return whether they have in time."""
        missing, end = set(ranks), time.monotonic() + seconds
        while missing := {rank for rank in missing if not self._store.check([f"{kind}/{rank}"])}:
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL)
        return True

    def _read(self, kind: str) -> dict[int, bytes]:
        keys = {rank: f"{kind}/{rank}" for rank in range(self.world)}
        return {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}


def open_store(started: Started, seconds: float, *, keeps: bool) -> Store:
    """Connect to the store of a run's ranks; with ``keeps`` this process keeps it."""
    store = TCPStore(
        started.address,
        started.port,
        is_master=keeps,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(f"llmt/{started.attempt}", store)


def board_of(store: Store, world: int) -> Board:
    """Return the board that lies in a run's store, which holds torch's own keys too."""
    return Board(PrefixStore("board", store), world)
