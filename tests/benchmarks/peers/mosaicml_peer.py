"""MosaicML streaming: rows of L tokens cut from concatenated documents into MDS; a last short row is dropped."""

import json
from pathlib import Path

import job
import numpy as np
from streaming import MDSWriter


def write(corpus: Path, tokenizer: Path, output: Path) -> None:
    with MDSWriter(columns={"tokens": f"ndarray:uint16:{job.LENGTH}"}, out=str(output)) as shards:
        buffer: list[int] = []
        for ids in job.tokenized(corpus, tokenizer):
            buffer += ids
            full = len(buffer) - len(buffer) % job.LENGTH
            for start in range(0, full, job.LENGTH):
                shards.write({"tokens": np.array(buffer[start : start + job.LENGTH], np.uint16)})
            del buffer[:full]


def count(output: Path) -> dict[str, int]:
    rows = sum(shard["samples"] for shard in json.loads((output / "index.json").read_text())["shards"])
    return {"tokens": rows * job.LENGTH, "rows": rows}


if __name__ == "__main__":
    job.main(write, count)
