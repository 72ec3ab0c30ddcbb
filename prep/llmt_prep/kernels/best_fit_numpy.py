"""Best-fit-decreasing without a compiler: the planning loops, which numba compiles too, and NumPy for the rest.

Rows that hold the same lengths in the same order are one group, and a group moves as a whole, so the work depends on
the row's capacity and on the distinct steps, not on the number of items.

The result has two tables. ``nodes`` is a forest: a node is a step that put ``COPIES`` items of one ``LENGTH`` into
each row of (a part of) its parent's group, and the path from a root to a node is the content of the rows that end
there. ``runs`` says, length after length, which slots of the result its items take.
"""

import numpy as np

PARENT, LENGTH, COPIES, ROWS, ITEMS, NEXT = range(6)
"""Columns of ``nodes``: -1 at a root; tokens; items of this length in a row; rows whose last step this is; items in
the row so far; next node with the same free space, -1 at the end."""

SLOT, RUN_COPIES, RUN_ROWS, STRIDE = range(4)
"""Columns of ``runs``: first slot; items in each row; rows; slots from one row of the run to the next."""

_CHUNK = 1 << 20


def histogram(lengths, capacity):
    """Count the items of each length: [capacity + 1]."""
    counts = np.zeros(capacity + 1, np.int64)
    for start in range(0, len(lengths), _CHUNK):  # bincount makes an int64 copy: keep it small
        counts += np.bincount(lengths[start : start + _CHUNK], minlength=capacity + 1)
    return counts


def plan(counts, capacity):  # noqa: C901  one loop: numba compiles no calls to plain functions
    """Return the ``nodes`` of best-fit-decreasing over a histogram.

    The tightest free space that takes one item of a length takes ``free // length`` of them, since what is left stays
    the tightest. Going down in length, the free spaces that are large enough form a stack: those that become large
    enough are smaller than all before. Equal free spaces are served first come, first served.
    """
    nodes = np.empty((1024, 6), np.int64)
    num_nodes = 0
    first = np.full(capacity + 1, -1, np.int64)  # queue of nodes for each free space
    last = np.full(capacity + 1, -1, np.int64)
    stack = np.empty(capacity + 1, np.int64)
    top = -1
    for length in range(capacity, 0, -1):
        if first[length] >= 0:
            top += 1
            stack[top] = length
        left = counts[length]
        while left > 0:
            free = capacity
            parent = -1
            available = left
            items = 0
            if top >= 0:
                free = stack[top]
                parent = first[free]
                available = nodes[parent, ROWS]
                items = nodes[parent, ITEMS]
            copies = min(free // length, left)
            rows = min(left // copies, available)
            left -= rows * copies
            if parent >= 0:
                nodes[parent, ROWS] -= rows
                if nodes[parent, ROWS] == 0:
                    first[free] = nodes[parent, NEXT]
                    if first[free] < 0:
                        top -= 1
            if num_nodes == len(nodes):
                grown = np.empty((2 * num_nodes, 6), np.int64)
                grown[:num_nodes] = nodes
                nodes = grown
            nodes[num_nodes, :] = (parent, length, copies, rows, items + copies, -1)
            rest = free - copies * length
            if rest > 0:
                if first[rest] >= 0:
                    nodes[last[rest], NEXT] = num_nodes
                else:
                    first[rest] = num_nodes
                    if rest >= length:  # the last items of this length left room for more: now the tightest
                        top += 1
                        stack[top] = rest
                last[rest] = num_nodes
            num_nodes += 1
    return nodes[:num_nodes]


def lay_out(nodes, capacity):
    """Number the rows, group after group, and give each length its slots.

    Returns:
        first_run: [capacity + 2]; the runs of length n are ``first_run[n] : first_run[n + 1]``.
        runs: [runs, 4].
        offsets: [rows + 1]; slots of each row.
    """
    first_run = np.zeros(capacity + 2, np.int64)
    num_rows = 0
    for leaf in range(len(nodes)):
        if nodes[leaf, ROWS] > 0:
            num_rows += nodes[leaf, ROWS]
            node = leaf
            while node >= 0:
                first_run[nodes[node, LENGTH] + 1] += 1
                node = nodes[node, PARENT]
    first_run = np.cumsum(first_run)
    runs = np.empty((first_run[-1], 4), np.int64)
    next_run = first_run.copy()
    offsets = np.zeros(num_rows + 1, np.int64)
    row = 0
    for leaf in range(len(nodes)):
        rows = nodes[leaf, ROWS]
        if rows > 0:
            node = leaf
            while node >= 0:
                run = next_run[nodes[node, LENGTH]]
                next_run[nodes[node, LENGTH]] += 1
                runs[run, SLOT] = offsets[row] + nodes[node, ITEMS] - nodes[node, COPIES]
                runs[run, RUN_COPIES] = nodes[node, COPIES]
                runs[run, RUN_ROWS] = rows
                runs[run, STRIDE] = nodes[leaf, ITEMS]
                node = nodes[node, PARENT]
            for _ in range(rows):
                offsets[row + 1] = offsets[row] + nodes[leaf, ITEMS]
                row += 1
    return first_run, runs, offsets


def place(lengths, first_run, runs):
    """Put every item into the next slot of its length: [slots], indices into ``lengths``."""
    items = np.empty(len(lengths), np.int64)
    by_length = np.argsort(lengths, kind="stable")  # runs are sorted by length, too
    ends = np.cumsum(runs[:, RUN_COPIES] * runs[:, RUN_ROWS])
    for start in range(0, len(lengths), _CHUNK):
        number = np.arange(start, min(start + _CHUNK, len(lengths)))
        run = np.searchsorted(ends, number, side="right")
        row, copy = np.divmod(number - (ends[run] - runs[run, RUN_COPIES] * runs[run, RUN_ROWS]), runs[run, RUN_COPIES])
        items[runs[run, SLOT] + row * runs[run, STRIDE] + copy] = by_length[number]
    return items
