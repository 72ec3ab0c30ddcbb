"""From a dataset's rows to the micro-batches of a run: which rows, in which order, and one thread that reads ahead.

The order is `llmt_shared.order`'s: a pure function of the seed and of how many rows were consumed. A step takes
`rows_per_step` rows from the endless concatenation of epochs; only the run's last step may be short. Every step is
cut into the same number of micro-batches on every rank, dealt out in turn; one that is left without rows is a row of
padding and adds exactly 0. A rank here is one of those that read different rows.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmt_shared.errors import ConfigError, DataError
from llmt_shared.objects import give_up
from llmt_shared.order import Blocks, endless_rows
from llmt_shared.segments import Pieces, count_targets, lay_out
from llmt_train.config import BatchConfig, TrainConfig
from llmt_train.data.batch import PackedBatch, assemble, collate
from llmt_train.data.rows import AnySplit

Item = TypeVar("Item")

_MOST_PASSES = 100
"""Over the training rows in one step; more is a slip of the pen, and would take hours before anything is seen."""


class Pairing(NamedTuple):
    """What preference data is read with."""

    with_chosen_prompts: bool = False
    """Label the prompts of the chosen sides too (ORPO's ``nll_on: all``)."""
    reference: Callable[[NDArray[np.int64]], NDArray[np.float64]] | None = None
    """From [P, 2] numbers of segments to the log-probability of their targets under the reference."""


NO_PAIRING = Pairing()

_ORDERED_AT_ONCE = 4096
"""Rows."""
_AHEAD = 64
"""Rows; a disk that is asked for so many at once gives ten times what it gives one by one."""


class Plan(NamedTuple):
    """The arithmetic of a run: how its rows fall into steps and micro-batches."""

    num_rows: int
    """Rows of the training split."""
    length: int
    """L: tokens of a row."""
    rows_per_step: int
    micro_rows: int
    """Rows of a micro-batch; the last one of a step may have fewer."""
    accumulation: int
    """Micro-batches of every step, on each rank."""
    total_rows: int
    """Rows that the run consumes, repeats counted."""
    total_steps: int
    seed: int
    ranks: int = 1
    """Over which the micro-batches are dealt out."""
    blocks: Blocks | None = None
    """Of rows that are shuffled together; ``None``: all."""

    def rows(self, first: int, count: int) -> NDArray[np.int64]:
        """Return rows in the order in which the run takes them, from the ``first`` on."""
        return endless_rows(self.seed, first, count, self.num_rows, self.blocks)


def plan_run(split: AnySplit, batch: BatchConfig, train: TrainConfig, ranks: int = 1) -> Plan:
    """Work out how a run's rows fall into steps.

    Args:
        split: the training rows.
        batch: of the run's config.
        train: likewise.
        ranks: that read different rows.

    Raises:
        ConfigError: ``batch.tokens`` is no multiple of the row length, or far more than there is.
        DataError: there are no rows, or no token in them is a target.
    """
    if split.num_rows == 0 or not _has_targets(split):
        raise DataError(f"{split.path}: {split.num_rows} rows without a single target; a row needs a document of >= 2")
    rows_per_step, rest = divmod(batch.tokens, split.length)
    if rest or rows_per_step == 0:
        legal = [str(rows * split.length) for rows in (rows_per_step, rows_per_step + 1) if rows]
        raise ConfigError(
            f"batch.tokens: {batch.tokens} is no multiple of the dataset's row length {split.length}; "
            f"nearest legal values: {' and '.join(legal)}"
        )
    if rows_per_step > _MOST_PASSES * split.num_rows:
        raise ConfigError(
            f"batch.tokens: {batch.tokens} is {rows_per_step:,} rows, which each step would take from a dataset of "
            f"{split.num_rows:,}; wanted a step that sees no row more than {_MOST_PASSES} times"
        )
    micro_rows = min(batch.micro_rows, -(-rows_per_step // ranks))
    total_rows = _total_rows(train, split.num_rows, rows_per_step)
    return Plan(
        num_rows=split.num_rows,
        length=split.length,
        rows_per_step=rows_per_step,
        micro_rows=micro_rows,
        accumulation=-(-rows_per_step // (micro_rows * ranks)),
        total_rows=total_rows,
        total_steps=-(-total_rows // rows_per_step),
        seed=train.seed,
        ranks=ranks,
        blocks=Blocks(split.rows_per_shard, train.shuffle_shards) if split.rows_per_shard else None,
    )


def _total_rows(train: TrainConfig, num_rows: int, rows_per_step: int) -> int:
    if train.steps is not None:
        return train.steps * rows_per_step
    assert train.epochs is not None  # the config holds one of the two
    return max(1, round(train.epochs * num_rows))


def _has_targets(split: AnySplit, block: int = 1024) -> bool:
    blocks = (np.arange(first, min(first + block, split.num_rows)) for first in range(0, split.num_rows, block))
    return any(split.targets(rows).any() for rows in blocks)


def rows_consumed(plan: Plan, step: int) -> int:
    """Return how many rows the first ``step`` steps take."""
    return min(step * plan.rows_per_step, plan.total_rows)


def rows_of_step(plan: Plan, step: int) -> NDArray[np.int64]:
    """Return the rows of one step (0, 1, ..), in the order of its micro-batches."""
    first = rows_consumed(plan, step)
    return plan.rows(first, rows_consumed(plan, step + 1) - first)


def train_batches(
    split: AnySplit, plan: Plan, first_step: int = 0, pairing: Pairing = NO_PAIRING, rank: int = 0
) -> Iterator[PackedBatch]:
    """Yield a rank's micro-batches of the steps from ``first_step`` to the run's last: ``accumulation`` for each."""
    dealt = partial(_dealt, micro_rows=plan.micro_rows, rank=rank, ranks=plan.ranks)
    with split.follow(plan) as reached:
        reached(rows_consumed(plan, first_step))
        steps = read_ahead(split, _rows_by_step(plan, first_step), dealt)
        for step, rows in enumerate(steps, first_step):
            first = rows_consumed(plan, step)
            reached(first)
            denominators = count(split, rows)
            pieces = _pieces(split, dealt(rows)).parts(plan.micro_rows)
            for start in plan.micro_rows * np.arange(rank, plan.accumulation * plan.ranks, plan.ranks):
                part = rows[start : start + plan.micro_rows]
                yield read_batch(split, part, denominators, pairing, first + int(start), next(pieces, None))


def _dealt(rows: NDArray[np.int64], micro_rows: int, rank: int, ranks: int) -> NDArray[np.int64]:
    """Those of a step's rows that a rank takes: every micro-batch whose turn is its own."""
    is_own: NDArray[np.bool_] = np.arange(len(rows)) // micro_rows % ranks == rank
    return rows[is_own]


def _rows_by_step(plan: Plan, first_step: int) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each step. The order of many steps is worked out at once, at a tenth of the cost."""
    many = max(1, _ORDERED_AT_ONCE // plan.rows_per_step)
    for step in range(first_step, plan.total_steps, many):
        first, stop = rows_consumed(plan, step), rows_consumed(plan, step + many)
        rows = plan.rows(first, stop - first)
        yield from np.split(rows, range(plan.rows_per_step, len(rows), plan.rows_per_step))


def eval_batches(
    split: AnySplit, micro_rows: int, pairing: Pairing = NO_PAIRING, *, rank: int = 0, ranks: int = 1
) -> Iterator[PackedBatch]:
    """Yield a rank's share of all rows of a split, in order; an evaluation counts as it goes: no denominators.

    Every rank yields as many micro-batches as the others: the last may be one of padding.
    """
    together = range(0, split.num_rows, ranks * micro_rows)
    borders = (first + rank * micro_rows for first in together)
    parts = (np.arange(first, min(first + micro_rows, split.num_rows)) for first in borders)
    with split.follow(None):
        for rows in read_ahead(split, parts):
            yield read_batch(split, rows, {}, pairing)


def read_ahead(
    split: AnySplit,
    parts: Iterable[NDArray[np.int64]],
    own: Callable[[NDArray[np.int64]], NDArray[np.int64]] = lambda rows: rows,
) -> Iterator[NDArray[np.int64]]:
    """Yield parts of the rows as they come, each when the kernel fetches at least `_AHEAD` of the rows after it.

    Args:
        split: where the rows are.
        parts: of them.
        own: which rows of a part are to be fetched.
    """
    waiting: deque[NDArray[np.int64]] = deque()
    num_rows = 0
    for part in parts:
        split.will_need(own(part))
        waiting.append(part)
        num_rows += len(part)
        while num_rows - len(waiting[0]) >= _AHEAD:
            num_rows -= len(waiting[0])
            yield waiting.popleft()
    yield from waiting


def count(split: AnySplit, rows: NDArray[np.int64]) -> dict[str, float]:
    """Return the denominators of a step that takes these rows: how many there are of what a loss may divide by.

    ``targets``; for preference data also ``pairs``, ``chosen_targets`` (on the chosen sides) and ``chosen_labels`` (on
    the chosen sides, prompts included). A step without any has the sum 0; dividing by 1 keeps it 0.
    """
    counts = {"targets": int(split.targets(rows).sum(dtype=np.int64))}
    table = split.pairs(rows)
    if table is not None:
        counts["pairs"] = len(table.segments)
        counts["chosen_targets"] = int(table.chosen_targets.sum(dtype=np.int64))
        counts["chosen_labels"] = int(count_targets(split.row_segments(rows).length[table.segments[:, 0]]).sum())
    return {name: float(max(1, number)) for name, number in counts.items()}


def read_batch(
    split: AnySplit,
    rows: NDArray[np.int64],
    denominators: dict[str, float],
    pairing: Pairing = NO_PAIRING,
    first_place: int = 0,
    pieces: Pieces | None = None,
) -> PackedBatch:
    """Read rows into one micro-batch; no rows give a row of padding.

    Args:
        split: where the rows are.
        rows: their numbers.
        denominators: of the whole step, from `count`.
        pairing: what is read beside the pairs, where the split has pairs.
        first_place: place of the first row in the run's order; the others follow.
        pieces: of these rows, where they were read before.
    """
    if len(rows) == 0:
        return _padding(split, denominators)
    pairs = split.pairs(rows)
    logps = None if pairs is None or pairing.reference is None else pairing.reference(pairs.numbers)
    return assemble(
        split.tokens(rows),
        _pieces(split, rows) if pieces is None else pieces,
        split.spans(rows),
        denominators,
        pairs=None if pairs is None else pairs.segments,
        with_chosen_prompts=pairing.with_chosen_prompts,
        reference_logps=logps,
        row_places=tuple(range(first_place, first_place + len(rows))),
    )


def _pieces(split: AnySplit, rows: NDArray[np.int64]) -> Pieces:
    return lay_out((len(rows), split.length), *split.row_segments(rows))


def _padding(split: AnySplit, denominators: dict[str, float]) -> PackedBatch:
    empty, no_pairs = np.empty(0, np.int64), np.empty((0, 2), np.int64)
    tokens = np.zeros((1, split.length), np.int64)
    has_pairs = split.pairs(empty) is not None
    return collate(
        tokens,
        np.zeros(1, np.int64),
        empty,
        empty,
        None,
        denominators,
        pairs=no_pairs if has_pairs else None,
        reference_logps=no_pairs.astype(np.float64) if has_pairs else None,
        row_places=(0,),
    )


class Prefetched(Generic[Item]):
    """An iterable that a thread of this process reads ahead; `close` stops the thread.

    A thread, because handing a tensor to another process costs more than making it here. An error in the thread is
    raised where the items are taken.
    """

    def __init__(self, make: Callable[[], Iterator[Item]], depth: int = 4) -> None:
        self._make = make
        self._queue: queue.SimpleQueue[tuple[Item | None, BaseException | None]] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[None] = queue.SimpleQueue()
        """As many as there are places in the queue, which does not count them itself."""
        for _ in range(depth):
            self._free.put(None)
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self.waited = 0.0
        """Seconds for which whoever takes the items has waited for them."""

    def __iter__(self) -> Iterator[Item]:
        """Start the thread with the first item taken (Lightning calls `iter` only to see whether it can)."""
        if self._thread is not None:
            raise RuntimeError("a prefetched stream is read once; make a new one")
        self._thread = threading.Thread(target=self._fill, name="llmt-prefetch", daemon=True)
        self._thread.start()
        while True:
            started = time.monotonic()
            item, error = self._queue.get()
            self.waited += time.monotonic() - started
            self._free.put(None)
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    def _fill(self) -> None:
        try:
            for item in self._make():
                self._free.get()
                if self._is_closed:
                    return
                self._queue.put((item, None))
            self._queue.put((None, None))
        except BaseException as error:  # whatever it is, the main thread must hear of it
            self._queue.put((None, error))

    def close(self) -> None:
        """Stop the thread and wait for it; harmless when it has ended or never ran.

        It does not wait for a store that fails: what is asked for now is not asked for again.
        """
        self._is_closed = True
        self._free.put(None)
        give_up()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.5)
            give_up()
