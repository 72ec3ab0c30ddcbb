"""Hugging Face datasets: Arrow files, memory-mapped; a micro-batch's rows are asked for by one list of row numbers."""

from collections.abc import Iterator
from pathlib import Path

import loader_job
import numpy as np
import pyarrow as pa
from datasets import Dataset, load_from_disk
from loader_job import LENGTH, MicroBatch, collate, open_flat


def write(folder: Path, output: Path) -> None:
    flat = open_flat(folder)
    table = pa.table({
        "tokens": pa.FixedSizeListArray.from_arrays(flat.tokens.reshape(-1), LENGTH),
        "lengths": pa.ListArray.from_arrays(flat.row_offsets.astype(np.int32), flat.segment_length),
    })  # fmt: skip
    Dataset(table).save_to_disk(str(output))


def batches(path: Path, micro_rows: int, form: str) -> Iterator[MicroBatch]:
    """``form``: what the library gives rows as, `numpy` or `torch`."""
    rows, random = load_from_disk(str(path)).with_format(form), np.random.default_rng(0)
    while True:
        order = random.permutation(len(rows)).tolist()
        for start in range(0, len(order), micro_rows):
            batch = rows[order[start : start + micro_rows]]
            yield collate(list(map(np.asarray, batch["tokens"])), list(map(np.asarray, batch["lengths"])))


if __name__ == "__main__":
    loader_job.main(batches, write)
