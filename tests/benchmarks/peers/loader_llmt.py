"""llmt's own loader, as `fit` uses it: bare, and through the thread that reads ahead."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import loader_job
from loader_job import LENGTH

from llmt_shared.dataset import open_dataset
from llmt_train.config import BatchConfig, TrainConfig
from llmt_train.data.batch import PackedBatch
from llmt_train.data.stream import Prefetched, plan_run, train_batches

ROWS_PER_STEP = 64


def batches(path: Path, micro_rows: int, way: str) -> Iterator[PackedBatch]:
    """``way``: `bare`, or `prefetched`."""
    split = open_dataset(path).train
    batch = BatchConfig(tokens=ROWS_PER_STEP * LENGTH, micro_rows=micro_rows)
    make = partial(train_batches, split, plan_run(split, batch, TrainConfig(steps=1 << 40)))
    return make() if way == "bare" else iter(Prefetched(make))


if __name__ == "__main__":
    loader_job.main(batches)
