"""Gathering without a compiler: a slice for each segment."""


def copy_segments(out, place, tokens, source, length):
    """Copy ``length[i]`` tokens from ``tokens[source[i] :]`` to ``out[place[i] :]`` for every i."""
    for to, start, count in zip(place.tolist(), source.tolist(), length.tolist(), strict=True):
        out[to : to + count] = tokens[start : start + count]


def clear_tails(rows, used):
    """Set the tokens of row r from place ``used[r]`` to 0."""
    for row in (used < rows.shape[1]).nonzero()[0].tolist():
        rows[row, used[row] :] = 0
