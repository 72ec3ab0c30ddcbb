"""llmt's own loader, as `fit` uses it: bare, and through the thread that reads ahead."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import loader_job
import numpy as np
import torch
from loader_job import LENGTH, MicroBatch

from llmt_shared.dataset import Split, open_dataset
from llmt_shared.segments import labels, lay_out, position_ids
from llmt_train.config import BatchConfig, TrainConfig
from llmt_train.data.batch import PackedBatch
from llmt_train.data.stream import Plan, Prefetched, _rows_by_step, plan_run, read_ahead, train_batches

ROWS_PER_STEP = 64


def batches(path: Path, micro_rows: int, way: str) -> Iterator[PackedBatch] | Iterator[MicroBatch]:
    """``way``: `bare`, `prefetched`, or `five`, bare and without the tensors that no peer makes."""
    split = open_dataset(path).train
    batch = BatchConfig(tokens=ROWS_PER_STEP * LENGTH, micro_rows=micro_rows)
    make = {"bare": train_batches, "prefetched": train_batches, "five": five}[way]
    made = partial(make, split, plan_run(split, batch, TrainConfig(steps=1 << 40)))
    return iter(Prefetched(made)) if way == "prefetched" else made()


def five(split: Split, plan: Plan) -> Iterator[MicroBatch]:
    """What `train_batches` and `assemble` do, as far as the five tensors go."""
    for rows in read_ahead(split, _rows_by_step(plan, 0)):
        pieces = lay_out((len(rows), LENGTH), *split.row_segments(rows)).parts(plan.micro_rows)
        for start, part in zip(range(0, len(rows), plan.micro_rows), pieces, strict=True):
            flat = split.tokens(rows[start : start + plan.micro_rows]).reshape(-1)
            yield MicroBatch(
                torch.from_numpy(flat.astype(np.int64)[None]),
                torch.from_numpy(labels(flat, part, None)[None]),
                torch.from_numpy(position_ids(part)[None]),
                torch.from_numpy(part.borders.astype(np.int32)),
                max(part.length.tolist()),
            )


if __name__ == "__main__":
    loader_job.main(batches)
