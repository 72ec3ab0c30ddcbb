"""Control tokens and text: which texts hold the strings of some, and which ids a text must not become."""

import re
from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

_MOST_RANGES = 8
"""Ranges of ids that are looked for one by one; more of them are looked up in a table."""


def control_string_finder(control_tokens: Sequence[str]) -> Callable[[str], str | None]:
    """Return a function that gives the first control string in a text, or ``None``.

    Tokenizers have hundreds of them and few texts hold any, so a text is first searched for their first two
    characters, of which there are few kinds.
    """
    starts = sorted({string[:2] for string in filter(None, control_tokens)})
    pattern = _any_of(control_tokens)

    def find(text: str) -> str | None:
        for start in starts:
            if start[-1] in text and start in text:  # one character is found ten times as fast as two
                break
        else:
            return None
        match = pattern.search(text)
        return match[0] if match else None

    return find


def control_string_lister(control_tokens: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a function that lists the control strings in a text, in order."""
    return _any_of(control_tokens).findall


def seam_finder(control_tokens: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a text could become a control string together with what stands beside it.

    It could where it ends as one begins, begins as one ends, or is the middle of one.
    """
    strings = [*filter(None, control_tokens)]
    heads = {string[:cut] for string in strings for cut in range(1, len(string))}
    tails = {string[cut:] for string in strings for cut in range(1, len(string))}
    middles = {tail[:cut] for tail in tails for cut in range(1, len(tail))}
    first, last = (_any_of({string[place] for string in strings}) for place in (0, -1))
    longest = max(map(len, strings), default=1)

    def find(text: str) -> bool:
        if text in middles:
            return True
        end, start = text[-longest:], text[:longest]
        if first.search(end) is None and last.search(start) is None:
            return False
        return any(text[-size:] in heads or text[:size] in tails for size in range(1, min(longest, len(text) + 1)))

    return find


def _any_of(strings: Collection[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, strings), key=len, reverse=True)  # a longer one wins over its own start
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def control_id_finder(control_ids: Collection[int]) -> Callable[[NDArray[np.uint32]], NDArray[np.intp]]:
    """Return a function that gives the places, ascending, at which ids are control tokens.

    Control tokens lie together in most vocabularies, and comparing with a few borders costs a fifth of a table.
    """
    wanted = np.array(sorted(control_ids), np.uint32)
    first = wanted[np.diff(wanted.astype(np.int64), prepend=-2) > 1]
    last = wanted[np.diff(wanted.astype(np.int64), append=2**32 + 1) > 1]
    ranges = list(zip(first, last - first, strict=True))

    def find(ids: NDArray[np.uint32]) -> NDArray[np.intp]:
        if len(ranges) > _MOST_RANGES:
            return np.flatnonzero(np.isin(ids, wanted))
        hits = [np.flatnonzero(ids - start <= extent) for start, extent in ranges]  # below the start it wraps round
        return np.sort(np.concatenate(hits)) if hits else np.empty(0, np.intp)

    return find
