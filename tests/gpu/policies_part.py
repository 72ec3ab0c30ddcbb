"""Activation checkpointing: what each policy takes of memory and of speed."""

from gpu.fits import check_same_start, sizes_of, try_run
from gpu.record import Report


def run(report: Report, profile: str) -> None:
    """Train the smaller Llama under each policy."""
    sizes, runs = sizes_of(profile), {}
    for policy in ("none", "attention", "selective", "full"):
        runs[policy] = try_run(report, policy, sizes, sizes.half, train={"checkpointing": policy})
    # The same kernels on the same numbers: only sums whose order is left to chance may differ.
    check_same_start(report, runs, 1e-3)
