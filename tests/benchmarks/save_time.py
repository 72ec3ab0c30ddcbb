"""How long a checkpoint holds up the training, written at once or beside it, and how much slower steps are meanwhile.

    OMP_NUM_THREADS=1 python tests/benchmarks/save_time.py [--millions 100] [--folder /path/on/the/disk/in/question]

One process with a model of so many parameters in fp32 and AdamW's state: 12 bytes each. A step is a few products of
matrices; steps are compared with those just before, for a machine may be busy with other things.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from llmt_train import checkpoints
from llmt_train.config.run import SaveConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=int, default=100)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(options.millions)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    print(f"{12 * options.millions:,} MB")
    for asynchronous in (False, True, False, True):
        usual = sum(step_seconds() for _ in range(40)) / 40
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            held_up, whole, slower = measure(Path(folder), model, optimizer, asynchronous)
        name = "beside the training" if asynchronous else "at once"
        also = f", steps meanwhile take {slower / usual:.2f} times as long" if asynchronous else ""
        print(f"{name:20} holds it up for {held_up:5.2f} s, is on the disk after {whole:5.2f} s{also}", flush=True)


def measure(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, asynchronous: bool
) -> tuple[float, float, float]:
    """Seconds of `save`, seconds until the checkpoint is there, and mean seconds of the steps in between."""
    state = checkpoints.State(step=1, rows_consumed=1, rows_per_step=1, digest="", seed=0)
    steps = []
    with checkpoints.Saver(folder, SaveConfig(asynchronous=asynchronous)) as saver:
        begun = time.monotonic()
        saver.save(state, {}, checkpoints.take({}, model, [optimizer], trained_alone=False))
        held_up = time.monotonic() - begun
        while checkpoints.newest_checkpoint(folder) is None:
            steps.append(step_seconds())
        whole = time.monotonic() - begun
    return held_up, whole, sum(steps) / max(1, len(steps))


def step_seconds() -> float:
    begun = time.perf_counter()
    x = torch.ones(1000, 1000)
    for _ in range(4):
        x = (x @ x).clamp(max=1)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
