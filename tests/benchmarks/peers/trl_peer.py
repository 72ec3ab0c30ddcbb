"""TRL: `map` with the transformers tokenizer, then `pack_dataset` as it comes: bfd per 1000, which truncates at L."""

from pathlib import Path
from typing import Any

import job
from datasets import load_dataset, load_from_disk
from transformers import PreTrainedTokenizerFast
from trl import pack_dataset


def write(corpus: Path, tokenizer: Path, output: Path) -> None:
    loaded = PreTrainedTokenizerFast.from_pretrained(str(tokenizer))

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = loaded(batch["text"], return_attention_mask=False, return_token_type_ids=False, verbose=False)
        return {"input_ids": [[*ids, loaded.eos_token_id] for ids in encoded["input_ids"]]}

    texts = load_dataset("json", data_files=str(corpus), split="train")
    documents = texts.map(tokenize, batched=True, remove_columns=texts.column_names)
    pack_dataset(documents, job.LENGTH).save_to_disk(str(output))


def count(output: Path) -> dict[str, int]:
    packed = load_from_disk(str(output))
    lengths = packed.data.column("seq_lengths").combine_chunks().flatten()
    return {"tokens": sum(lengths.to_pylist()), "rows": len(packed)}


if __name__ == "__main__":
    job.main(write, count)
