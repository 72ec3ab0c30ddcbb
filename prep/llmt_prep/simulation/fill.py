"""How full rows get: the real packer on windows of real size, with lengths drawn from the sample.

The fill of a small sample's own rows says little: its last rows are short, and few documents find little company. So
windows are drawn until the fill stays where it is, or until there are no more documents.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep.config import MixConfig
from llmt_prep.packing import Pieces, pack_windows, row_tokens, split_documents
from llmt_prep.simulation.amounts import cut
from llmt_prep.simulation.tokenize_trial import Documents

FEWEST_WINDOWS = 8
MOST_DOCUMENTS = 1 << 22
STABLE = 5e-5
"""By which the fill of earlier and later windows may differ."""


class Fill(NamedTuple):
    """Rows that were packed to see how full they get."""

    documents: int
    rows: int
    """That went out with a window: of more documents, so many more."""
    tokens: int
    """In them."""
    last_rows: int
    """Left over by the last window: of a corpus of any size, once."""
    last_tokens: int
    is_stable: bool
    """Whether later windows became as full as earlier ones."""

    def rows_for(self, tokens: int, capacity: int) -> int:
        """Return how many rows hold so many tokens; they are never fewer than full ones."""
        if self.tokens and tokens > self.last_tokens:
            rows = self.last_rows + self.rows * (tokens - self.last_tokens) / self.tokens
        else:  # all is left over
            rows = self.last_rows * tokens / max(1, self.last_tokens)
        return max(math.ceil(tokens / capacity), math.ceil(rows))


def pack_drawn(config: MixConfig, samples: Sequence[Documents], documents: Sequence[float]) -> Fill:
    """Pack as many documents as are selected, or as many as show how full rows get.

    Args:
        config: rows, windows and carry; its seed draws.
        samples: of each source.
        documents: to be packed of each source.
    """
    counted: list[tuple[int, int]] = []
    num_windows = num_documents = 0

    def windows() -> Iterator[Pieces]:
        nonlocal num_windows, num_documents
        for size, pieces in _drawn_windows(config, samples, documents):
            if _is_stable(counted):
                return
            num_windows, num_documents = num_windows + 1, num_documents + size
            yield pieces

    for packed in pack_windows(windows(), config.sequence.length, config.packing.carry):
        counted.append((len(packed.offsets) - 1, int(row_tokens(packed).sum())))
    (rows, tokens), (last_rows, last_tokens) = _sums(counted[:num_windows]), _sums(counted[num_windows:])
    return Fill(num_documents, rows, tokens, last_rows, last_tokens, _is_stable(counted[:num_windows]))


def _sums(counted: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(rows for rows, _ in counted), sum(tokens for _, tokens in counted)


def _is_stable(counted: Sequence[tuple[int, int]]) -> bool:
    """Whether two halves of the windows, but for the first, which had nothing carried over to it, are as full."""
    if len(counted) < FEWEST_WINDOWS:
        return False
    middle = (len(counted) + 1) // 2
    (early, early_tokens), (late, late_tokens) = _sums(counted[1:middle]), _sums(counted[middle:])
    if not early or not late:
        return False
    before, after = early_tokens / early, late_tokens / late
    return abs(after - before) <= STABLE * before


def _drawn_windows(
    config: MixConfig, samples: Sequence[Documents], documents: Sequence[float]
) -> Iterator[tuple[int, Pieces]]:
    """Windows of drawn documents, each with its size: of every source so many as the windows of a run have."""
    wanted = np.array(documents, np.float64)
    total, done = min(round(wanted.sum()), MOST_DOCUMENTS), np.zeros(len(samples), np.int64)
    for end in [*range(config.packing.window, total, config.packing.window), total]:
        reached = np.rint(wanted * (end / wanted.sum())).astype(np.int64)
        columns = []
        for source, (sample, first, last) in enumerate(zip(samples, done.tolist(), reached.tolist(), strict=True)):
            chosen = draw(len(sample.length), first, last, (config.seed, source))
            columns.append((sample.length[chosen], sample.outline[chosen, 0]))
        lengths, first_targets = (np.concatenate(column) for column in zip(*columns, strict=True))
        yield len(lengths), split_documents(lengths, config.sequence.length, cut(config), first_targets)
        done = reached


def draw(size: int, first: int, last: int, keys: tuple[int, ...]) -> NDArray[np.int64]:
    """Return numbers ``first`` to ``last`` of an endless draw that takes all of ``size`` documents before one again.

    Args:
        size: of the sample.
        first: from 0.
        last: after the last.
        keys: decide the order.
    """
    begin, end = first // size, last // size

    def order(turn: int) -> NDArray[np.int64]:
        return np.random.default_rng([*keys, turn]).permutation(size)

    if begin == end:
        return order(begin)[first % size : last % size]
    whole = np.tile(np.arange(size), end - begin - 1)  # their order inside one window changes nothing
    return np.concatenate([order(begin)[first % size :], whole, order(end)[: last % size]])
