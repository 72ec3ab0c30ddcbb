"""litdata: StreamingDataset with TokensLoader, its fastest reader, which knows nothing but blocks of one size.

So a block is a row's tokens, the number of its segments, and their lengths, filled up with zeros.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import loader_job
import numpy as np
from litdata import StreamingDataset, TokensLoader, optimize
from loader_job import LENGTH, MicroBatch, collate, open_flat


def write(folder: Path, output: Path) -> None:
    optimize(
        fn=blocks,
        inputs=[str(folder)],
        output_dir=str(output),
        num_workers=1,
        chunk_bytes="64MB",
        item_loader=TokensLoader(),
    )


def blocks(folder: str) -> Iterator[np.ndarray]:
    flat = open_flat(Path(folder))
    size = LENGTH + 1 + int(np.diff(flat.row_offsets).max())
    for row, tokens in enumerate(flat.tokens):
        lengths = flat.lengths(row)
        block = np.zeros(size, np.uint16)
        block[:LENGTH], block[LENGTH], block[LENGTH + 1 :][: len(lengths)] = tokens, len(lengths), lengths
        yield block


def batches(path: Path, micro_rows: int) -> Iterator[MicroBatch]:
    chunk = json.loads((path / "index.json").read_text())["chunks"][0]
    loader = TokensLoader(block_size=chunk["dim"] // chunk["chunk_size"])
    rows = StreamingDataset(str(path), item_loader=loader, shuffle=True)
    while True:
        tokens, lengths = [], []
        for block in rows:
            tokens.append(block[:LENGTH])
            lengths.append(block[LENGTH + 1 :][: int(block[LENGTH])])
            if len(tokens) == micro_rows:
                yield collate(tokens, lengths)
                tokens, lengths = [], []


if __name__ == "__main__":
    loader_job.main(batches, write)
