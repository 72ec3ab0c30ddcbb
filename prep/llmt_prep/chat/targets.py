"""From characters that are targets to tokens that are: a token with one such character is one.

Spans are rounded outward to the borders of tokens; what that adds is counted.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep.chat.offsets import Extents


class Runs(NamedTuple):
    """Runs of target tokens in texts that were encoded one after another: N runs."""

    text: NDArray[np.int64]
    """[N]; number of the text."""
    start: NDArray[np.int64]
    """[N]; first token, counted from the text's first. Runs of a text ascend and share no token."""
    length: NDArray[np.int64]
    """[N]; at least 1."""
    straddling: NDArray[np.int64]
    """[N]; how many of its tokens lie partly outside: 0, 1 or 2."""


def target_runs(
    extents: Extents, first_token: NDArray[np.int64], text: NDArray[np.int64], spans: NDArray[np.int64]
) -> Runs:
    """Return the tokens that hold a character of a span.

    Args:
        extents: of the tokens of all texts.
        first_token: [texts] first token of each text; it is no target, for nothing before it predicts it.
        text: [N] text in which each span lies, ascending.
        spans: [N, 2] begin and end of each span, in its text, in the unit of the extents; those of a text ascend.
    """
    has_characters = spans[:, 1] > spans[:, 0]
    text, spans = text[has_characters], spans[has_characters]
    begin, end = (extents.text[text] + spans.T).reshape(2, -1)
    start = np.searchsorted(extents.end, begin, "right")
    stop = np.searchsorted(extents.begin, end, "left")
    begins_before, ends_behind = _at(extents.begin, start) < begin, _at(extents.end, stop - 1) > end
    start = np.maximum(start, first_token[text] + 1)
    start[1:] = np.maximum(start[1:], stop[:-1])  # two spans may end and begin in one token
    kept = stop > start
    text, start = text[kept], start[kept]
    return Runs(
        text, start - first_token[text], stop[kept] - start, (begins_before.astype(np.int64) + ends_behind)[kept]
    )


def _at(values: NDArray[np.int64], index: NDArray[np.intp]) -> NDArray[np.int64]:
    """Values at places; beside the ends, those at the ends."""
    return values[np.clip(index, 0, max(len(values) - 1, 0))] if len(values) else np.zeros(len(index), np.int64)
