"""datasets: `map` tokenizes, a second `map` packs every 1000 documents best fit decreasing, `save_to_disk`.

Documents longer than a row are split, as llmt does, so that nothing is lost; rows keep the lengths of their segments.
"""

from bisect import bisect_left, insort
from pathlib import Path
from typing import Any

import job
from datasets import load_dataset, load_from_disk
from tokenizers import Tokenizer

Batch = dict[str, list[Any]]


def write(corpus: Path, tokenizer: Path, output: Path) -> None:
    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    eos = loaded.token_to_id(job.eos_token(tokenizer))

    def tokenize(batch: Batch) -> Batch:
        return {"input_ids": [[*encoding.ids, eos] for encoding in loaded.encode_batch_fast(batch["text"])]}

    texts = load_dataset("json", data_files=str(corpus), split="train")
    documents = texts.map(tokenize, batched=True, remove_columns=texts.column_names)
    documents.map(pack, batched=True, batch_size=job.BATCH).save_to_disk(str(output))


def pack(batch: Batch) -> Batch:
    pieces = [ids[i : i + job.LENGTH] for ids in batch["input_ids"] for i in range(0, len(ids), job.LENGTH)]
    rows = best_fit_decreasing([len(piece) for piece in pieces], job.LENGTH)
    return {
        "input_ids": [[token for i in row for token in pieces[i]] for row in rows],
        "seq_lengths": [[len(pieces[i]) for i in row] for row in rows],
    }


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free space, row), sorted
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        place = bisect_left(free, (lengths[i], 0))
        if place == len(free):
            rows.append([])
            space, row = capacity, len(rows) - 1
        else:
            space, row = free.pop(place)
        rows[row].append(i)
        if space > lengths[i]:
            insort(free, (space - lengths[i], row))
    return rows


def count(output: Path) -> dict[str, int]:
    packed = load_from_disk(str(output))
    lengths = packed.data.column("seq_lengths").combine_chunks().flatten()
    return {"tokens": sum(lengths.to_pylist()), "rows": len(packed)}


if __name__ == "__main__":
    job.main(write, count)
