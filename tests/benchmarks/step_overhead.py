"""Where the time of a training step goes: the model, the optimizer, and everything else, which is ours.

    python tests/benchmarks/step_overhead.py MODEL [--length 4096] [--steps 6] [--micro 2]

A run of `fit` on synthetic rows, with a stopwatch around what is the model's: its forward pass with the head and the
loss, the backward pass, the optimizer's step. What is left of a step's time is ours and Lightning's: waiting for rows,
moving them, measures, clipping, metrics, progress. The first step, which warms up, is left out.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from llmt_train import module
from llmt_train.config import RunConfig
from llmt_train.data.stream import Prefetched
from llmt_train.fit import fit

PARTS = ("forward", "backward", "optimizer", "waiting for rows", "clipping")


class Stopwatch:
    """Seconds by part, for each step."""

    def __init__(self):
        self.steps = []
        self.now = defaultdict(float)
        self.begun = time.perf_counter()

    def around(self, part, function):
        """The same function, timed; what is timed inside it does not count twice."""

        def timed(*arguments, **keywords):
            before, start = sum(self.now.values()), time.perf_counter()
            result = function(*arguments, **keywords)
            inside = sum(self.now.values()) - before
            self.now[part] += time.perf_counter() - start - inside
            return result

        return timed

    def end_step(self):
        end = time.perf_counter()
        self.steps.append(dict(self.now) | {"step": end - self.begun})
        self.now.clear()
        self.begun = end


def instrument(watch):
    """Put the stopwatch where the parts are."""
    module.TrainModule.scores = watch.around("forward", module.TrainModule.scores)
    SingleDeviceStrategy.backward = watch.around("backward", SingleDeviceStrategy.backward)
    torch.nn.utils.clip_grad_norm_ = watch.around("clipping", torch.nn.utils.clip_grad_norm_)
    torch.optim.AdamW.step = watch.around("optimizer", torch.optim.AdamW.step)  # without the closure inside it
    read = Prefetched.__iter__

    def waiting(self):
        rows = read(self)
        get = watch.around("waiting for rows", lambda: next(rows, None))
        while (batch := get()) is not None:
            yield batch

    Prefetched.__iter__ = waiting
    advance = module.TrainModule.on_train_batch_end

    def ended(self, *arguments):
        if self._is_new_step:
            watch.end_step()
        return advance(self, *arguments)

    module.TrainModule.on_train_batch_end = ended


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--micro", type=int, default=2, help="micro-batches of one row in each step")
    given = parser.parse_args()
    watch = Stopwatch()
    instrument(watch)
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "task": "pretrain", "model": given.model, "output": str(Path(folder) / "run"), "precision": "fp32",
            "data": {"synthetic": {"length": given.length, "rows": 64}}, "optim": {"lr": 1e-5},
            "batch": {"tokens": given.micro * given.length}, "train": {"steps": given.steps}, "save": {"every": 10**6},
        }  # fmt: skip
        fit(RunConfig.model_validate(config))
    steps = watch.steps[1:]
    whole = statistics.median(step["step"] for step in steps)
    parts = {part: statistics.median(step.get(part, 0.0) for step in steps) for part in PARTS}
    ours = statistics.median(
        step["step"] - sum(step.get(part, 0.0) for part in ("forward", "backward", "optimizer")) for step in steps
    )
    print(json.dumps({"step": whole, **parts, "ours, all": ours, "share": ours / whole}, indent=1))


if __name__ == "__main__":
    main()
