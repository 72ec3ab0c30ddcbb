"""What is wrong in rows: counted over all blocks, told once for each code with the first row as the example."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep.scan import Block
from llmt_prep.verify.findings import Finding, finding


class Hit(NamedTuple):
    """Rows of one block with one problem."""

    code: str
    row: int
    """The first of them."""
    num_rows: int
    message: str


def in_rows(code: str, first_row: int, is_wrong: NDArray[np.bool_], message: str) -> list[Hit]:
    """Return the hit for rows marked in a block that starts at ``first_row``; none where none is marked."""
    rows = np.flatnonzero(is_wrong)
    return [Hit(code, first_row + int(rows[0]), len(rows), message)] if rows.size else []


def by_segment(code: str, block: Block, is_wrong: NDArray[np.bool_], message: str) -> list[Hit]:
    """Return the hit for the rows of the segments marked in a block."""
    in_row = np.bincount(block.row - block.first_row, is_wrong, len(block.segments.per_row)) > 0
    return in_rows(code, block.first_row, in_row, message)


def merged(hits: Iterable[Hit], split: str) -> list[Finding]:
    """Return one finding for each code, in the order of codes; ``hits`` come in the order of rows."""
    first: dict[str, Hit] = {}
    totals: dict[str, int] = {}
    for hit in hits:
        first.setdefault(hit.code, hit)
        totals[hit.code] = totals.get(hit.code, 0) + hit.num_rows
    return [
        finding(code, f"{split} row {hit.row}", hit.message + _more(totals[code]))
        for code, hit in sorted(first.items())
    ]


def _more(num_rows: int) -> str:
    return f" ({num_rows} rows in all)" if num_rows > 1 else ""
