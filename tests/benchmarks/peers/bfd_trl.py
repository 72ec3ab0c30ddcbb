"""TRL's `_pack_bfd` on one table, without what it moves: ours moves no tokens, so they are left out of its time too."""

from collections.abc import Callable
from types import SimpleNamespace

import bfd
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from trl import data_utils

COPIES = {
    "filter": lambda column, mask: column,  # drops empty documents, of which there are none
    "list_slice": lambda column, start, stop: column,  # truncates at L, which no document exceeds
    "take": lambda examples, indices: examples,  # moves the documents of a row together
}
"""What its module calls of Arrow to copy the token lists, four fifths of its time; these give back what they get."""


def prepare(lengths: bfd.Lengths, capacity: int) -> Callable[[], int]:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.nulls(int(offsets[-1])))})
    data_utils.pc = SimpleNamespace(**vars(pc) | COPIES)
    return lambda: len(data_utils._pack_bfd(table, capacity))


if __name__ == "__main__":
    bfd.main(prepare)
