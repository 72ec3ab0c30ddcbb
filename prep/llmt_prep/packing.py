"""Documents to rows: cutting what is too long, exact best-fit-decreasing, and windows that carry what fits badly.

Sources: packing from a histogram of lengths, Krell et al. 2021, arXiv:2107.02027; best-fit-decreasing for language
models, Ding et al. 2024, arXiv:2404.10830.
"""

from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmt_shared.errors import DataError
from llmt_shared.order import shuffled

Overflow = Literal["split", "truncate", "truncate_prompt", "drop", "error"]
"""What becomes of a document longer than a row."""

WINDOW = 65_536
"""Documents that are packed together."""

CARRY = 0.98
"""Rows less full than this wait for the next window, where better company may come."""

MAX_CARRIED = 65_536
"""Items that may wait at once. Web-like lengths never have more than a few thousand waiting; without a bound, lengths
that never fit together (all of 0.6 rows) would wait for ever."""


_MANY_ITEMS = 300_000
"""Importing numba takes 0.3 s, as long as packing so many items without it."""


class Rows(NamedTuple):
    """Items grouped by row; row r owns ``items[offsets[r] : offsets[r + 1]]``, in the order they were put there.

    Rows with few long items tend to come first.
    """

    offsets: NDArray[np.int64]
    """[rows + 1]"""
    items: NDArray[np.int64]
    """[items]; indices into what was packed."""


class Pieces(NamedTuple):
    """Parts of documents that fit a row."""

    document: NDArray[np.int64]
    """[P]; index of the document."""
    offset: NDArray[np.int64]
    """[P]; first token, counted from the document's first."""
    length: NDArray[np.int32]
    """[P]; tokens, at least 1."""


class Items(Protocol):
    """What can be packed: a NamedTuple of columns of one size, such as `Pieces`, that has a ``length``."""

    @property
    def length(self) -> NDArray[np.int32]:
        """[P]; tokens that the item takes in its row."""

    def __iter__(self) -> Iterator[Any]: ...


ItemsT = TypeVar("ItemsT", bound=Items)


class PackedRows(NamedTuple, Generic[ItemsT]):
    """Rows together with what they hold; row r owns places ``offsets[r] : offsets[r + 1]`` of every column."""

    offsets: NDArray[np.int64]
    """[rows + 1]"""
    items: ItemsT


def pack(
    lengths: NDArray[np.integer],
    capacity: int,
    overflow: Overflow,
    *,
    window: int = WINDOW,
    carry: float = CARRY,
    seed: int = 0,
) -> PackedRows[Pieces]:
    """Pack documents of one array: windows of ``window`` documents, in their order, then all rows permuted.

    Rows come out of best-fit-decreasing sorted by how many segments they hold, so they must be permuted; documents
    are expected in random order already.

    Raises:
        DataError: ``overflow`` is ``error`` and a document is longer than ``capacity``.
    """
    landing(lengths, capacity, overflow)  # names the document by its place in the whole array
    packed = list(pack_windows(_windows_of(lengths, capacity, overflow, window), capacity, carry))
    if not packed:
        return PackedRows(np.zeros(1, np.int64), split_documents(lengths[:0], capacity, overflow))
    counts = np.concatenate([np.diff(rows.offsets) for rows in packed])
    whole = PackedRows(_offsets(counts), _joined([rows.items for rows in packed]))
    return take_rows(whole, shuffled(len(counts), seed))


def pack_windows(
    windows: Iterable[ItemsT], capacity: int, carry: float = CARRY, max_carried: int = MAX_CARRIED
) -> Iterator[PackedRows[ItemsT]]:
    """Pack window after window, every item exactly once; what the last window leaves comes as it is.

    Args:
        windows: items of 1 to ``capacity`` tokens.
        capacity: tokens of a row.
        carry: rows filled to less than this part of ``capacity`` are taken apart, and their items packed again with
            the next window; 0 carries nothing.
        max_carried: items that may wait; of more, those in the fullest rows go out. So memory is bounded by one
            window and this many items.
    """
    if not 0 <= carry <= 1:
        raise ValueError(f"carry must lie in 0..1, not {carry}")
    waiting: PackedRows[ItemsT] | None = None
    num_packed = 0
    for window in windows:
        items = window if waiting is None else _joined([waiting.items, window])
        num_packed += len(items.length)
        offsets, order = _best_fit(items.length, capacity, _kernels(num_packed))
        rows = PackedRows(offsets, _taken(items, order))
        is_ready = _is_ready(rows, carry * capacity, max_carried)
        yield take_rows(rows, np.flatnonzero(is_ready))
        waiting = take_rows(rows, np.flatnonzero(~is_ready))
    if waiting is not None and len(waiting.offsets) > 1:
        yield waiting


def best_fit_decreasing(lengths: NDArray[np.integer], capacity: int) -> Rows:
    """Put every item, longest first, into the row with the smallest free space that takes it.

    Among equal lengths the first item goes first, among equal free spaces the row that has had it longest.

    Args:
        lengths: [n] tokens, each 1 to ``capacity``.
        capacity: tokens of a row, below 2^31.

    Raises:
        ValueError: a length is outside that range.
    """
    return _best_fit(lengths, capacity, _kernels(len(lengths)))


def split_documents(
    lengths: NDArray[np.integer],
    capacity: int,
    overflow: Overflow,
    first_target: NDArray[np.integer] | Literal[0] = 0,
) -> Pieces:
    """Cut documents into as few pieces of at most ``capacity`` tokens as possible, in order; empty ones give none.

    Args:
        lengths: [D] tokens.
        capacity: tokens of a row.
        overflow: ``split`` makes full pieces and one remainder, ``truncate`` keeps the first ``capacity`` tokens,
            ``drop`` leaves the whole document out; the others are as in `landing`.
        first_target: as in `landing`.

    Raises:
        DataError: ``overflow`` is ``error`` and a document is longer than ``capacity``.
    """
    kept = landing(lengths, capacity, overflow, first_target)
    num_pieces = -(-kept // capacity)
    document = np.repeat(np.arange(len(kept)), num_pieces)
    first_piece = np.cumsum(num_pieces) - num_pieces
    offset = (np.arange(len(document)) - first_piece[document]) * capacity
    return Pieces(document, offset, np.minimum(kept[document] - offset, capacity).astype(np.int32))


def landing(
    lengths: NDArray[np.integer],
    capacity: int,
    overflow: Overflow,
    first_target: NDArray[np.integer] | Literal[0] = 0,
) -> NDArray[np.int64]:
    """Return how many tokens of each document land in rows: [D].

    Args:
        lengths: [D] tokens.
        capacity: tokens of a row.
        overflow: ``truncate`` keeps the first ``capacity`` tokens, ``truncate_prompt`` takes equally many from the
            left of both sides of a pair.
        first_target: [D] tokens before a document's first target. What would keep none of its targets, or no token
            before them, is dropped.

    Raises:
        DataError: ``overflow`` is ``error`` and a document is longer than ``capacity``; the message counts documents
            from the first of ``lengths``.
    """
    tokens = np.asarray(lengths, np.int64)
    if overflow == "split":
        return tokens
    is_long = tokens > capacity
    if overflow == "truncate":
        return np.where(is_long, np.where(np.less(first_target, capacity), capacity, 0), tokens)
    if overflow == "truncate_prompt":
        from_each = -((capacity - tokens) // 2)
        return np.where(is_long, np.where(from_each < first_target, tokens - 2 * from_each, 0), tokens)
    if overflow == "error" and is_long.any():
        document = int(is_long.argmax())
        raise DataError(
            f"document {document} has {tokens[document]:,} tokens, more than the {capacity:,} of a row; "
            f"raise sequence.length, or set another sequence.overflow"
        )
    return np.where(is_long, 0, tokens)


def take_rows(rows: PackedRows[ItemsT], index: NDArray[np.int64]) -> PackedRows[ItemsT]:
    """Return the rows at ``index``, in its order, with their items."""
    counts = np.diff(rows.offsets)[index]
    offsets = _offsets(counts)
    shift = np.repeat(rows.offsets[index] - offsets[:-1], counts)
    return PackedRows(offsets, _taken(rows.items, np.arange(offsets[-1]) + shift))


def row_tokens(rows: PackedRows[ItemsT]) -> NDArray[np.int64]:
    """Return the tokens that are no padding: [rows]."""
    return np.diff(_offsets(rows.items.length)[rows.offsets])


def _windows_of(lengths: NDArray[np.integer], capacity: int, overflow: Overflow, window: int) -> Iterator[Pieces]:
    for first in range(0, len(lengths), window):
        pieces = split_documents(lengths[first : first + window], capacity, overflow)
        yield pieces._replace(document=pieces.document + first)


def _is_ready(rows: PackedRows[ItemsT], enough: float, max_carried: int) -> NDArray[np.bool_]:
    """Which rows go out: those with enough tokens, then the fullest until few enough items wait."""
    tokens = row_tokens(rows)
    by_fill = np.argsort(-tokens, kind="stable")
    counts = np.diff(rows.offsets)[by_fill]
    waiting_with_this = counts[::-1].cumsum()[::-1]
    is_ready = np.empty(len(tokens), bool)
    is_ready[by_fill] = (tokens[by_fill] >= enough) | (waiting_with_this > max_carried)
    return is_ready


def _best_fit(lengths: NDArray[np.integer], capacity: int, kernels: ModuleType) -> Rows:
    if not 1 <= capacity < 2**31:
        raise ValueError(f"a row cannot have {capacity} tokens")
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"items of {lengths.min()} to {lengths.max()} tokens; a row takes 1 to {capacity}")
    largest = min(capacity, max(1, int(lengths.sum(dtype=np.int64))))  # kernels have tables as large as a row
    return _assigned(kernels, np.ascontiguousarray(lengths, np.int32), largest)


def _kernels(num_items: int) -> ModuleType:
    """The loops to pack so many items with, in all; the rows are the same with either."""
    from llmt_prep.kernels import best_fit_numpy

    if num_items < _MANY_ITEMS:
        return best_fit_numpy
    try:
        from llmt_prep.kernels import best_fit
    except ImportError:  # no numba for this Python yet: slower
        return best_fit_numpy
    return best_fit


def _assigned(kernels: ModuleType, lengths: NDArray[np.int32], capacity: int) -> Rows:
    nodes = kernels.plan(kernels.histogram(lengths, capacity), capacity)
    first_run, runs, offsets = kernels.lay_out(nodes, capacity)
    return Rows(offsets, kernels.place(lengths, first_run, runs))


def _offsets(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _joined(parts: list[ItemsT]) -> ItemsT:
    return _alike(parts[0], (np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _taken(items: ItemsT, index: NDArray[np.int64]) -> ItemsT:
    return _alike(items, (column[index] for column in items))


def _alike(items: ItemsT, columns: Iterable[NDArray[Any]]) -> ItemsT:
    make: Callable[..., ItemsT] = type(items)
    return make(*columns)
