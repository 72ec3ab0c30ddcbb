"""MosaicML streaming: rows as MDS samples of two arrays, through StreamingDataset."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loader_job
import numpy as np
from loader_job import LENGTH, MicroBatch, collate, open_flat
from streaming import MDSWriter, StreamingDataset


def write(folder: Path, output: Path) -> None:
    flat = open_flat(folder)
    columns = {"tokens": f"ndarray:uint16:{LENGTH}", "lengths": "ndarray:uint16"}
    with MDSWriter(columns=columns, out=str(output)) as shards:
        for row, tokens in enumerate(flat.tokens):
            shards.write({"tokens": tokens, "lengths": flat.lengths(row)})


def batches(path: Path, micro_rows: int, way: str) -> Iterator[MicroBatch]:
    """``way``: `stream`, iterated over with its own shuffle; or `item`, asked for by the numbers of a permutation."""
    dataset, random = StreamingDataset(local=str(path), shuffle=True, batch_size=micro_rows), np.random.default_rng(0)
    while True:
        rows: Iterator[dict[str, Any]] = (
            iter(dataset) if way == "stream" else map(dataset.__getitem__, random.permutation(dataset.size).tolist())
        )
        tokens, lengths = [], []
        for row in rows:
            tokens.append(row["tokens"])
            lengths.append(row["lengths"])
            if len(tokens) == micro_rows:
                yield collate(tokens, lengths)
                tokens, lengths = [], []


if __name__ == "__main__":
    loader_job.main(batches, write)
