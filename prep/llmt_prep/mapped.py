"""Reading mapped files without keeping them in memory: a page once read counts as the process's own until it is let go.

Letting go costs nothing but mapping the page again, from the system's page cache, where it is read again.
"""

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEP = 1024
"""Elements that `take` reads between two releases: each may make 64 KB resident, for neighbours are mapped along."""


def take(array: NDArray[Any], index: NDArray[np.int64]) -> NDArray[Any]:
    """Return ``array[index]``; of a mapped array, not more than 64 MB become resident, however the index jumps."""
    out = np.empty(len(index), array.dtype)
    for start in range(0, len(index), _STEP):
        np.take(array, index[start : start + _STEP], out=out[start : start + _STEP])
        release(array)
    return out


def release(array: NDArray[Any]) -> None:
    """Let go of the resident pages of the file that an array maps for reading; for another array, do nothing."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and not array.flags.writeable:
        base.madvise(mmap.MADV_DONTNEED)
