"""In which order rows are seen: a pure function of its arguments, so that resuming needs no state but a count.

`shuffled` and `rows` use their own 64-bit mixing and never NumPy's generators, whose streams may change between
releases: the same seed gives the same order on every machine and version.
"""

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

SMALL = 65_536
"""Below this many rows a Feistel network is not uniform (n = 5 fails even at 10 rounds), so we sort keys instead."""

_ROUNDS = 6
_OF_SHARDS, _OF_ROWS = 1, 2
"""Set the key of an epoch's shards apart from those of the rows of its blocks."""
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Blocks(NamedTuple):
    """Rows in shards, of which so many at a time are shuffled together: what is read then lies in few files.

    An epoch's shards are permuted, and cut into blocks; a block's rows are permuted among themselves. Where one block
    holds all shards, that is a permutation of all rows.
    """

    rows_per_shard: int
    """The last shard may have fewer."""
    shards: int
    """Of a block; the last one may have fewer."""

    def num_shards(self, n: int) -> int:
        """Shards of ``n`` rows."""
        return -(-n // self.rows_per_shard)

    def is_one(self, n: int) -> bool:
        """Whether all of ``n`` rows are in one block."""
        return self.num_shards(n) <= self.shards


class Block(NamedTuple):
    """One block of an epoch; S shards."""

    first: int
    """Its first row's place in the epoch."""
    stop: int
    shards: NDArray[np.int64]
    """[S]"""


class RowOrder(Protocol):
    """In which order a run takes the rows of a split."""

    @property
    def seed(self) -> int:
        """Of the run."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""

    @property
    def total_rows(self) -> int:
        """Rows that the run takes, in all its epochs."""

    @property
    def blocks(self) -> Blocks | None:
        """``None``: all rows are shuffled together."""


def rows(seed: int, epoch: int, first: int, count: int, n: int, blocks: Blocks | None = None) -> NDArray[np.int64]:
    """Return places ``first .. first + count`` of one epoch's permutation of ``n`` rows: [count].

    Args:
        seed: of the run.
        epoch: from 0.
        first: place in the epoch.
        count: of the rows asked for.
        n: rows of an epoch.
        blocks: how rows lie in shards, and how many shards are shuffled together; ``None``: all.

    Raises:
        ValueError: the range does not lie in ``0 .. n``.
    """
    if not 0 <= first <= first + count <= n:
        raise ValueError(f"places {first}..{first + count} of an epoch of {n} rows")
    if blocks is not None and not blocks.is_one(n):
        return _block_rows(seed, epoch, first, count, n, blocks)
    if n <= SMALL:
        return _small_permutation(n, seed, epoch)[first : first + count].copy()
    return _feistel(np.arange(first, first + count, dtype=np.uint64), n, key(seed, epoch))


def endless_rows(seed: int, first: int, count: int, n: int, blocks: Blocks | None = None) -> NDArray[np.int64]:
    """Return places of the concatenation of all epochs: [count]; a step's rows may cross the border of an epoch."""
    if n == 0:
        raise ValueError("no rows to order")
    parts = []
    while count > 0:
        epoch, start = divmod(first, n)
        part = rows(seed, epoch, start, min(count, n - start), n, blocks)
        parts.append(part)
        first, count = first + len(part), count - len(part)
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def block_at(seed: int, epoch: int, place: int, n: int, blocks: Blocks) -> Block:
    """Return the block of an epoch that holds a place."""
    if blocks.is_one(n):
        return Block(0, n, np.arange(blocks.num_shards(n)))
    starts = _block_starts(seed, epoch, n, blocks)
    number = int(np.searchsorted(starts, place, "right")) - 1
    return Block(int(starts[number]), int(starts[number + 1]), _shards_of_block(seed, epoch, number, n, blocks))


def _block_rows(seed: int, epoch: int, first: int, count: int, n: int, blocks: Blocks) -> NDArray[np.int64]:
    out = np.empty(count, np.int64)
    done = 0
    while done < count:
        block = block_at(seed, epoch, first + done, n, blocks)
        many = min(count - done, block.stop - first - done)
        size, start = block.stop - block.first, first + done - block.first
        inner = rows(key(seed, epoch, _OF_ROWS, block.first), 0, start, many, size)
        out[done : done + many] = _in_shards(inner, block.shards, n, blocks.rows_per_shard)
        done += many
    return out


def _in_shards(inner: NDArray[np.int64], shards: NDArray[np.int64], n: int, rows_per_shard: int) -> NDArray[np.int64]:
    """Rows of the split from rows counted through a block's shards."""
    ends = np.cumsum(np.minimum(rows_per_shard, n - shards * rows_per_shard))
    which = np.searchsorted(ends, inner, "right")
    found: NDArray[np.int64] = shards[which] * rows_per_shard + inner - np.append(0, ends)[which]
    return found


def _shards_of_block(seed: int, epoch: int, number: int, n: int, blocks: Blocks) -> NDArray[np.int64]:
    first, num_shards = number * blocks.shards, blocks.num_shards(n)
    return rows(key(seed, epoch, _OF_SHARDS), 0, first, min(blocks.shards, num_shards - first), num_shards)


@lru_cache(maxsize=4)
def _block_starts(seed: int, epoch: int, n: int, blocks: Blocks) -> NDArray[np.int64]:
    """[blocks + 1] first place of each block of an epoch, and its end; one block has the shard that may be short."""
    num_shards = blocks.num_shards(n)
    shards = rows(key(seed, epoch, _OF_SHARDS), 0, 0, num_shards, num_shards)
    ends = np.cumsum(np.minimum(blocks.rows_per_shard, n - shards * blocks.rows_per_shard))
    last = np.minimum(np.arange(blocks.shards, num_shards + blocks.shards, blocks.shards), num_shards) - 1
    return np.append(0, ends[last])


def shuffled(n: int, *keys: int) -> NDArray[np.int64]:
    """Return a permutation of ``n`` places chosen by ``keys``: the order of their mixed 64-bit numbers.

    Two places share a number with a chance below n^2 / 2^65; then they keep their order.
    """
    place = np.arange(n, dtype=np.uint64)
    numbers = mix(place + np.uint64(key(*keys)))
    low = np.uint64((1 << max(n - 1, 0).bit_length()) - 1)
    packed = np.sort((numbers & ~low) | place)  # several times faster than argsort, which only ties need
    if (packed[1:] & ~low == packed[:-1] & ~low).any():
        return np.argsort(numbers, kind="stable")
    return (packed & low).astype(np.int64)


def key(*parts: int) -> int:
    """Return one 64-bit key from several whole numbers, each of which matters, as does their order."""
    state = np.uint64(0)
    for part in parts:
        state = mix(np.array([(int(state) ^ (part & _MASK)) + _GOLDEN & _MASK], np.uint64))[0]
    return int(state)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return well-mixed 64-bit numbers, one for each: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=4)
def _small_permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return shuffled(n, seed, epoch)


def _feistel(index: NDArray[np.uint64], n: int, key_: int) -> NDArray[np.int64]:
    """Permute ``0 .. n`` by an alternating Feistel network over the next power of two, walking cycles back inside.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains". The domain is below 2n, so a walk takes
    fewer than two steps on average.
    """
    bits = (n - 1).bit_length()
    result = _encrypt(index, bits, key_)
    outside = np.flatnonzero(result >= n)
    while outside.size:
        result[outside] = _encrypt(result[outside], bits, key_)
        outside = outside[result[outside] >= n]
    return result.astype(np.int64)


def _encrypt(x: NDArray[np.uint64], bits: int, key_: int) -> NDArray[np.uint64]:
    right_bits = np.uint64(bits - bits // 2)
    left_mask = np.uint64((1 << (bits // 2)) - 1)
    right_mask = np.uint64((1 << int(right_bits)) - 1)
    left, right = x >> right_bits, x & right_mask
    for turn in range(0, _ROUNDS, 2):
        left = left ^ (mix(right + np.uint64(key(key_, turn))) & left_mask)
        right = right ^ (mix(left + np.uint64(key(key_, turn + 1))) & right_mask)
    return (left << right_bits) | right
