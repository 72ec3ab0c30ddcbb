"""TRL's `_pack_bfd` on one table; its tokens are Arrow nulls, which take no memory, so that only packing costs."""

from collections.abc import Callable

import bfd
import numpy as np
import pyarrow as pa
from trl.data_utils import _pack_bfd


def prepare(lengths: bfd.Lengths, capacity: int) -> Callable[[], int]:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    documents = pa.ListArray.from_arrays(offsets, pa.nulls(int(offsets[-1])))
    table = pa.table({"input_ids": documents})
    return lambda: len(_pack_bfd(table, capacity))


if __name__ == "__main__":
    bfd.main(prepare)
