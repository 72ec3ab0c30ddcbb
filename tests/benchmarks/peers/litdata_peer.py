"""litdata: `optimize` for TokensLoader. Documents are concatenated in order; the reader cuts chunks into rows."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import job
import numpy as np
from litdata import TokensLoader, optimize


def write(corpus: Path, tokenizer: Path, output: Path) -> None:
    optimize(
        fn=partial(documents, tokenizer=str(tokenizer)),
        inputs=[str(corpus)],
        output_dir=str(output),
        num_workers=1,
        chunk_bytes="64MB",
        item_loader=TokensLoader(block_size=job.LENGTH),
    )


def documents(corpus: str, tokenizer: str) -> Iterator[np.ndarray]:
    for ids in job.tokenized(Path(corpus), Path(tokenizer)):
        yield np.array(ids, np.uint16)


def count(output: Path) -> dict[str, int]:
    chunks = json.loads((output / "index.json").read_text())["chunks"]
    return {"tokens": sum(chunk["dim"] for chunk in chunks), "rows": 0}


if __name__ == "__main__":
    job.main(write, count)
