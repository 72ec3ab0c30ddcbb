"""What is written down of a step beside its losses: amounts, speed, and what the machine made of it.

All of it is known on the host: nothing here waits for the device.
"""

import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmt_train.data.batch import PackedBatch
from llmt_train.data.stream import Plan, rows_consumed
from llmt_train.model.flops import ModelFlops, model_flops, peak_flops, step_flops, this_device_name

_SHORTEST = 1e-9  # seconds; a clock may stand still


class Meter:
    """Measures steps one after another: of each its batches, its time, and its waiting for batches."""

    def __init__(
        self,
        plan: Plan,
        flops: ModelFlops | None,
        peak: float | None,
        waited: Callable[[], float],
        over_ranks: Callable[[Tensor], Tensor] = lambda amounts: amounts,
    ) -> None:
        """Keep what the speed of a step is measured by.

        Args:
            plan: the run's.
            flops: what the model needs; ``None`` where it is not known.
            peak: FLOP/s of all devices; ``None`` where it is not known, or is not of the run's arithmetic.
            waited: seconds for which the run has waited for batches so far.
            over_ranks: adds up amounts of those that read different rows; all call `read` together then.
        """
        self._over_ranks = over_ranks
        self._plan = plan
        self._flops = flops
        self._peak = peak
        self._waited = waited
        self._on_gpu = torch.cuda.is_available()
        self._lengths: list[int] = []
        self.start()

    def start(self) -> None:
        """Begin a step now: what was before (evaluating, saving, sampling) is not part of its time."""
        self._begin(time.monotonic())

    def _begin(self, now: float) -> None:
        self._clock, self._waited_before = now, self._waited()
        self._lengths.clear()

    def add(self, batch: PackedBatch) -> None:
        """Count a micro-batch."""
        self._lengths.extend(batch.segment_lengths)

    def read(self, step: int) -> dict[str, Any]:
        """Return what is known of the step that ends now, and begin the next.

        ``tokens`` and ``rows`` were consumed up to it, padding included; ``tokens_per_s`` counts the same of this step
        alone. ``fill`` is the share of its tokens that is no padding, ``data_wait`` the share of its time spent
        waiting for a batch, ``peak_memory`` the most bytes held so far. Its arithmetic (see `flops`) is ``mfu``, a
        share of the devices' peak, or else ``tflops``, 1e12 FLOP/s. What a live reference computes is not counted.
        Amounts and speeds are of all ranks together; ``data_wait`` and ``peak_memory`` are of this one.
        """
        now = time.monotonic()
        seconds, waited = max(now - self._clock, _SHORTEST), self._waited() - self._waited_before
        before, rows = rows_consumed(self._plan, step - 1), rows_consumed(self._plan, step)
        tokens = (rows - before) * self._plan.length
        lengths = np.array(self._lengths, np.int64)
        flops = 0.0 if self._flops is None else step_flops(self._flops, lengths)
        amounts = self._over_ranks(torch.tensor([lengths.sum(), flops], dtype=torch.float64))
        num_real, flops = amounts.tolist()
        self._begin(now)
        return {
            "tokens": rows * self._plan.length,
            "rows": rows,
            "tokens_per_s": round(tokens / seconds, 1),
            **self._speed(flops / seconds),
            "fill": num_real / tokens,
            "data_wait": round(min(waited / seconds, 1.0), 4),
            "peak_memory": _peak_memory(self._on_gpu),
        }

    def _speed(self, speed: float) -> dict[str, float]:
        if self._flops is None:
            return {}
        return {"tflops": round(speed / 1e12, 6)} if self._peak is None else {"mfu": round(speed / self._peak, 4)}


def flops_of(model: Any) -> ModelFlops | None:
    """Return what a model needs; ``None`` where its config does not say: a run is not to fail for want of a number."""
    try:
        return model_flops(model)
    except (AttributeError, TypeError):
        return None


def peak_of_this_device(computes_in_bf16: bool) -> float | None:
    """Return the FLOP/s of which MFU is a share; ``None`` where the device is not known or computes in fp32."""
    name = this_device_name()
    return peak_flops(name) if name is not None and computes_in_bf16 else None


def _peak_memory(on_gpu: bool) -> int:
    """Bytes: allocated by torch on the GPU; without one, resident of this process."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, StopIteration), open("/proc/self/status") as lines:
        # Not `ru_maxrss`, which a process inherits from the one that started it.
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
