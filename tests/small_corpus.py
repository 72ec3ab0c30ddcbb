"""A corpus in memory, as gathering sees it."""

from types import SimpleNamespace

import numpy as np


def make_corpus(unit_lengths: list[list[int]], dtype: type = np.uint16) -> SimpleNamespace:
    """Units of documents of these lengths; token t of the corpus is t + 1, record numbers have gaps."""
    total, borders, opened = 0, [0], []
    for lengths in unit_lengths:
        tokens = np.arange(total + 1, total + sum(lengths) + 1, dtype=dtype)
        tokens.flags.writeable = False
        opened.append(SimpleNamespace(tokens=tokens, records=np.arange(len(lengths), dtype=np.uint32) * 3))
        total += sum(lengths)
        borders.append(total)
    number = np.arange(len(unit_lengths))
    units = {"source": number % 3, "first_record": 1000 * number + 7}
    documents = np.cumsum([0, *map(len, unit_lengths)])
    return SimpleNamespace(
        units=units, token_borders=np.array(borders), document_borders=documents, open_unit=opened.__getitem__
    )
