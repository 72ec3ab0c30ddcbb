"""What training asks of the rows that it reads: those of a dataset on disk answer it, and so do synthetic ones."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmt_shared.dataset import PairTable, RowSegments, SegmentTable
from llmt_shared.manifest import TokenizerEntry
from llmt_shared.objects import Location
from llmt_shared.order import RowOrder
from llmt_shared.segments import Spans

Numbers = Sequence[int] | NDArray[np.integer]
"""R numbers of rows, in any order."""


class AnySplit(Protocol):
    """The rows of one split: `llmt_shared.dataset.Split` says what each method returns."""

    path: Location
    """Where they are, for messages."""
    num_rows: int
    length: int
    """L: tokens of a row."""

    @property
    def rows_per_shard(self) -> int:
        """Rows of one file of tokens; 0 where there are no files."""

    def tokens(self, rows: Numbers) -> NDArray[Any]:
        """[R, L]."""

    def targets(self, rows: Numbers) -> NDArray[np.uint32]:
        """[R]."""

    def will_need(self, rows: Numbers) -> None:
        """These are read soon."""

    def row_segments(self, rows: Numbers) -> RowSegments:
        """What training needs of the segments."""

    def segments(self, rows: Numbers) -> SegmentTable:
        """In the order of ``rows``, as all that follows."""

    def spans(self, rows: Numbers) -> Spans | None:
        """``None`` where every token is a target."""

    def pairs(self, rows: Numbers) -> PairTable | None:
        """``None`` where there are none."""

    def follow(self, order: RowOrder | None) -> AbstractContextManager[Callable[[int], None]]:
        """While the block runs, rows are taken in this order; what it gives is told the place of the next."""

    def longest_segment(self) -> int:
        """No segment has more tokens."""


class AnyDataset(Protocol):
    """All splits, and what is true of all: `llmt_shared.dataset.Dataset`, or a `SyntheticDataset`."""

    @property
    def path(self) -> Location:
        """Where it is, for messages."""

    @property
    def folder(self) -> Path | None:
        """Where its files lie but, perhaps, the arrays' chunks; ``None`` where there are none."""

    @property
    def kind(self) -> str:
        """pretrain, sft or preference."""

    @property
    def digest(self) -> str:
        """Equal digests mean equal rows."""

    @property
    def sources(self) -> tuple[str, ...]:
        """By the indices of `SegmentTable.source`."""

    @property
    def tokenizer(self) -> TokenizerEntry:
        """Of the token ids."""

    @property
    def tokenizer_dir(self) -> Path | None:
        """The tokenizer's files; ``None`` where tokens mean nothing."""

    @property
    def train(self) -> AnySplit:
        """Rows to train on."""

    @property
    def validation(self) -> AnySplit | None:
        """``None`` where nothing was held out."""
