"""Best-fit-decreasing compiled with numba: what `best_fit_numpy` does, in one streaming pass over the items."""

import numpy as np

from llmt_prep.kernels import best_fit_numpy
from llmt_prep.kernels.best_fit_numpy import RUN_COPIES, RUN_ROWS, SLOT, STRIDE
from llmt_prep.kernels.compiling import compiled

plan = compiled(best_fit_numpy.plan)
lay_out = compiled(best_fit_numpy.lay_out)

_RUN = 3  # column of the state below that `runs` uses for STRIDE


@compiled
def histogram(lengths, capacity):
    """Count the items of each length: [capacity + 1]."""
    counts = np.zeros(capacity + 1, np.int64)
    for item in range(len(lengths)):
        counts[lengths[item]] += 1
    return counts


@compiled
def place(lengths, first_run, runs):
    """Put every item into the next slot of its length: [slots], indices into ``lengths``."""
    items = np.empty(len(lengths), np.int64)
    state = np.empty((len(first_run) - 1, 4), np.int64)  # of each length: next slot, copies and rows left, run
    for length in range(len(state)):
        run = first_run[length]
        if run < first_run[length + 1]:
            state[length, :_RUN] = runs[run, :_RUN]
            state[length, _RUN] = run
    for item in range(len(lengths)):
        length = lengths[item]
        slot = state[length, SLOT]
        items[slot] = item
        if state[length, RUN_COPIES] > 1:
            state[length, SLOT] = slot + 1
            state[length, RUN_COPIES] -= 1
            continue
        run = state[length, _RUN]
        if state[length, RUN_ROWS] > 1:
            state[length, SLOT] = slot + 1 + runs[run, STRIDE] - runs[run, RUN_COPIES]
            state[length, RUN_COPIES] = runs[run, RUN_COPIES]
            state[length, RUN_ROWS] -= 1
        elif run + 1 < first_run[length + 1]:
            state[length, :_RUN] = runs[run + 1, :_RUN]
            state[length, _RUN] = run + 1
    return items
