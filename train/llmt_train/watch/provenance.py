"""Where documents of a dataset come from: their input files and the records in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where a document is read from."""

    file: str
    """Data: not escaped for a terminal."""
    record: int
    """Physical line or row of the file, from 0."""


def find_places(dataset: Path | None, documents: Sequence[int]) -> list[Place | None]:
    """Return where documents (``segment_document``) come from, by files.parquet.

    Args:
        dataset: its folder, if it has one.
        documents: their numbers.

    Returns:
        ``None`` for all where there is no such file, or where it cannot be read: `pyarrow` belongs to packing, and a
        run can do without.
    """
    if dataset is None:
        return [None] * len(documents)
    try:
        import pyarrow.parquet as pq

        table = pq.read_table(dataset / "files.parquet", columns=["path", "first_document"])
    except Exception:  # whatever is wrong with it: who asks has something else to say
        return [None] * len(documents)
    first, paths = table["first_document"].to_numpy(), table["path"]
    # The last file that begins at or before the document: one without records owns none.
    files = np.searchsorted(first, np.array(documents, np.uint64), "right") - 1
    found = zip(files.tolist(), documents, strict=True)
    return [Place(paths[file].as_py(), number - int(first[file])) if file >= 0 else None for file, number in found]
