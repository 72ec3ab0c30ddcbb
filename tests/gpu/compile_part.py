"""What torch.compile and Liger's kernels do for speed and memory."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from gpu.device_part import device_of
from gpu.fits import check_same_start, sizes_of, try_run
from gpu.record import Report

from llmt_train.model import compilation


def run(report: Report, profile: str) -> None:
    """Train the smaller Llama in each way."""
    sizes, is_dry, runs = sizes_of(profile), device_of(profile) == "cpu", {}
    has_liger = importlib.util.find_spec("liger_kernel") is not None and not is_dry
    for name, train in {
        "plain": {},
        "liger": {"liger": True},
        "compiled": {"compile": True},
        "compiled, liger": {"compile": True, "liger": True},
        "compiled, full checkpointing": {"compile": True, "checkpointing": "full"},
    }.items():
        if train.get("liger") and not has_liger:
            report.absent(name, "liger-kernel is not installed" if not is_dry else "Liger needs a CUDA device")
            continue
        with _traced_alone() if is_dry else nullcontext():
            runs[name] = try_run(report, name, sizes, sizes.half, train=train)
    # Fused operations leave out some roundings to bf16, of 4e-3 each.
    check_same_start(report, runs, 1e-2)


@contextmanager
def _traced_alone() -> Iterator[None]:
    """Let torch.compile trace, without the minutes that making code takes on a CPU."""
    before = torch.compile
    compilation.torch.compile = lambda function, **options: before(function, backend="eager", **options)
    try:
        yield
    finally:
        compilation.torch.compile = before
