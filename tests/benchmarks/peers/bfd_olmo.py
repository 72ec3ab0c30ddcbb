"""OLMo-core's `InstancePacker`, which takes the begin and end of every document."""

from collections.abc import Callable

import bfd
import numpy as np
from olmo_core.data.utils import InstancePacker


def prepare(lengths: bfd.Lengths, capacity: int) -> Callable[[], int]:
    ends = np.cumsum(lengths, dtype=np.int64)
    borders = np.stack([ends - lengths, ends], axis=1)
    return lambda: len(InstancePacker(capacity).pack_documents(borders)[0])


if __name__ == "__main__":
    bfd.main(prepare)
