"""Rows out of thin air, to try out speed and memory without shards: random tokens, documents of log-normal length.

A row is a function of the settings and of its number alone, so nothing is stored and any number of rows takes no
memory. It is filled with documents (chats, pairs) as they are drawn; the last one is cut to what is left of the row.
A chat, and each side of a pair, is a prompt and an answer: one span of targets, at its end.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from llmt_shared.chunks import unfollowed
from llmt_shared.dataset import PairTable, RowSegments, SegmentTable
from llmt_shared.errors import ConfigError
from llmt_shared.manifest import TokenizerEntry
from llmt_shared.objects import Location
from llmt_shared.order import RowOrder, key, mix
from llmt_shared.segments import Spans, count_targets
from llmt_train.config import SyntheticConfig
from llmt_train.data.rows import Numbers

_VERSION = 1
"""Raised when the same settings give other rows."""
_SHORTEST = 2
"""Tokens of a segment: one that is a target, and one before it."""
_CASES = 1 << 16
"""Equally likely lengths of a document."""
_TO_CASES = np.uint64(64 - 16)
_HALF, _LOW = np.uint64(32), np.uint64((1 << 32) - 1)
_CACHED = 64
"""Rows whose lengths are kept: a micro-batch asks for them several times."""


@dataclass(frozen=True)
class SyntheticDataset:
    """Rows that are drawn when they are read; an `AnyDataset`."""

    kind: str
    digest: str
    """Of everything that the rows depend on."""
    tokenizer: TokenizerEntry
    """There is none; its ids go up to the largest that may be drawn."""
    train: "SyntheticSplit"
    validation: "SyntheticSplit | None"
    path: Location = Path("synthetic")
    folder: None = None
    sources: tuple[str, ...] = ("synthetic",)
    tokenizer_dir: None = None


def open_synthetic(settings: SyntheticConfig, kind: str, vocab_size: int) -> SyntheticDataset:
    """Return the rows that settings describe.

    Args:
        settings: theirs.
        kind: pretrain, sft or preference.
        vocab_size: tokens are drawn below it; goes before that of the settings.

    Raises:
        ConfigError: rows too short for a pair.
    """
    shortest = _SHORTEST * _sides(kind)
    if settings.length < shortest:
        raise ConfigError(f"data.synthetic.length: a pair does not fit {settings.length} tokens; wanted >= {shortest}")
    resolved = settings.model_copy(update={"vocab_size": vocab_size})
    table = _quantiles(settings)
    train, held_out = (SyntheticSplit(resolved, kind, name, table) for name in ("train", "validation"))
    return SyntheticDataset(
        kind=kind,
        digest=hashlib.sha256(f"synthetic {_VERSION} {kind} {resolved.model_dump_json()}".encode()).hexdigest(),
        tokenizer=TokenizerEntry(
            digest="", vocab_size=vocab_size, max_id=vocab_size - 1, bos_id=None, eos_id=None, pad_id=None
        ),
        train=train,
        validation=held_out if settings.held_out else None,
    )


class SyntheticSplit:
    """The rows of one split; an `AnySplit`.

    Numbers of documents and of segments through the split are unique and ascending, but have gaps: to count without
    any, all rows before would have to be drawn.
    """

    def __init__(self, settings: SyntheticConfig, kind: str, name: str, quantiles: NDArray[np.int64]) -> None:
        assert settings.vocab_size is not None  # `open_synthetic` has filled it in
        self.path: Location = Path("synthetic") / name
        self.length = settings.length
        self.num_rows = settings.rows if name == "train" else settings.held_out
        self.rows_per_shard = 0
        self._kind = kind
        self._sides = _sides(kind)
        self._share = settings.targets
        self._vocab_size = np.uint64(settings.vocab_size)
        self._quantiles = quantiles
        self._mean = float(quantiles.mean())
        stream = ("train", "validation").index(name)
        self._token_key = np.uint64(key(settings.seed, stream, 0))
        self._length_key = np.uint64(key(settings.seed, stream, 1))
        self._lengths = lru_cache(_CACHED)(self._draw_lengths)

    def tokens(self, rows: Numbers) -> NDArray[np.uint64]:
        """[R, L]; evenly distributed over the vocabulary, 0 where a row is padding."""
        numbers = _numbers(self._token_key, rows, -(-self.length // 2))
        halves = numbers >> _HALF, numbers & _LOW  # two tokens from each
        tokens = np.concatenate([half * self._vocab_size >> _HALF for half in halves], axis=1)[:, : self.length]
        for row, number in zip(tokens, rows, strict=True):
            row[self._lengths(int(number)).sum() :] = 0
        return tokens

    def targets(self, rows: Numbers) -> NDArray[np.uint32]:
        """[R] labels that count in the loss."""
        return np.array([self._targets(self._lengths(int(row))).sum() for row in rows], np.uint32)

    def will_need(self, rows: Numbers) -> None:
        """Do nothing: nothing is fetched."""

    def row_segments(self, rows: Numbers) -> RowSegments:
        """Return what training needs of the segments of some rows, in the order of ``rows``."""
        per_row, lengths = self._segments(rows)
        return RowSegments(per_row, lengths.astype(np.uint32), np.zeros(len(lengths), np.uint16))

    def segments(self, rows: Numbers) -> SegmentTable:
        """Return the segments of some rows, in the order of ``rows``."""
        per_row, lengths, sources = self.row_segments(rows)
        places = np.arange(len(lengths)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        documents = np.repeat(np.asarray(rows, np.int64), per_row) * self.length + places // self._sides
        offsets = np.zeros((len(lengths) // self._sides, self._sides), np.uint32)
        offsets[:, 1:] = lengths.reshape(offsets.shape)[:, :-1]
        return SegmentTable(
            per_row,
            lengths,
            offsets.ravel(),
            documents.astype(np.uint64),
            sources,
        )

    def spans(self, rows: Numbers) -> Spans | None:
        """Return the targets of some rows laid end to end; ``None`` for pre-training."""
        if self._kind == "pretrain":
            return None
        ends = [place * self.length + np.cumsum(self._lengths(int(row))) for place, row in enumerate(rows)]
        targets = self._targets(self._segments(rows)[1])
        return Spans(np.concatenate([*ends, np.empty(0, np.int64)]) - targets, targets)

    def pairs(self, rows: Numbers) -> PairTable | None:
        """Return the preference pairs of some rows, in the order of ``rows``; ``None`` but for preference data."""
        if self._kind != "preference":
            return None
        per_row, lengths = self._segments(rows)
        segments = np.arange(len(lengths))
        before = np.asarray(rows, np.int64) * self.length - (np.cumsum(per_row) - per_row)
        numbers = segments + np.repeat(before, per_row)
        chosen = [self._targets(self._lengths(int(row))[::2]).sum() for row in rows]
        return PairTable(per_row // 2, segments.reshape(-1, 2), numbers.reshape(-1, 2), np.array(chosen, np.uint32))

    def follow(self, order: RowOrder | None) -> AbstractContextManager[Callable[[int], None]]:
        """Do nothing: rows are drawn when they are read."""
        return unfollowed()

    def longest_segment(self) -> int:
        """Return the tokens of the longest segment that may be drawn."""
        return min(int(self._quantiles[-1]), self.length - _SHORTEST * (self._sides - 1))

    def _segments(self, rows: Numbers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[R] segments of each row, [S] their tokens."""
        parts = [self._lengths(int(row)) for row in rows]
        return np.array([len(part) for part in parts], np.int64), np.concatenate([*parts, np.empty(0, np.int64)])

    def _targets(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """[S] targets of segments; the first token is never one."""
        most = count_targets(lengths)
        if self._kind == "pretrain":
            return most
        targets: NDArray[np.int64] = np.rint(lengths * self._share).astype(np.int64).clip(1, most)
        return targets

    def _draw_lengths(self, row: int) -> NDArray[np.int64]:
        """[S] tokens of a row's segments."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"{self.path}: row {row} is not in 0 .. {self.num_rows}")
        count = 8 + int(1.5 * self.length / self._mean)  # enough for most rows
        while True:
            cases = _numbers(self._length_key, [row], count * self._sides)[0] >> _TO_CASES
            documents = self._quantiles[cases].reshape(count, self._sides)
            ends = documents.sum(axis=1).cumsum()
            if ends[-1] >= self.length:
                return _filled(documents, ends, self.length)
            count *= 2


def _filled(documents: NDArray[np.int64], ends: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Segments of the documents that a row has room for, the last one cut to the room that is left.

    Args:
        documents: [D, sides] tokens.
        ends: [D] where each of them would end; at least one is not below ``length``.
        length: of the row.
    """
    last = int(ends.searchsorted(length))
    whole, room = documents[:last].ravel(), length - int(ends[last - 1] if last else 0)
    first, *others = documents[last].tolist()
    if room < _SHORTEST * (1 + len(others)):
        return whole
    if not others:
        return np.concatenate([whole, [room]])
    cut = min(max(first * room // (first + others[0]), _SHORTEST), room - _SHORTEST)
    return np.concatenate([whole, [cut, room - cut]])


def _quantiles(settings: SyntheticConfig) -> NDArray[np.int64]:
    """[_CASES] equally likely lengths, ascending; log-normal, but no longer than a row."""
    normal = NormalDist()
    deviations = np.array([normal.inv_cdf((case + 0.5) / _CASES) for case in range(_CASES)])
    logs = np.minimum(math.log(settings.median) + settings.sigma * deviations, math.log(settings.length))
    return np.clip(np.rint(np.exp(logs)).astype(np.int64), _SHORTEST, settings.length)


def _numbers(key: np.uint64, rows: Numbers, count: int) -> NDArray[np.uint64]:
    """[R, count] random numbers; each is a function of the key, its row and its place."""
    places: NDArray[np.uint64] = np.arange(count, dtype=np.uint64) + key
    return mix((np.asarray(rows, np.uint64) << _HALF)[:, None] + places)


def _sides(kind: str) -> int:
    """Segments of a document."""
    return 2 if kind == "preference" else 1
