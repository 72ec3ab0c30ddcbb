"""`datasets.map` with `apply_chat_template(return_assistant_tokens_mask=True)`, one conversation a call."""

from pathlib import Path
from typing import Any

import job
from datasets import load_dataset, load_from_disk
from transformers import PreTrainedTokenizerFast


def write(corpus: Path, tokenizer: Path, output: Path) -> None:
    loaded = PreTrainedTokenizerFast.from_pretrained(str(tokenizer))

    def tokenize(record: dict[str, Any]) -> dict[str, Any]:
        encoded = loaded.apply_chat_template(
            record["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}

    chats = load_dataset("json", data_files=str(corpus), split="train")
    chats.map(tokenize, remove_columns=chats.column_names).save_to_disk(str(output))


def count(output: Path) -> dict[str, int]:
    made = load_from_disk(str(output))
    tokens = made.data.column("input_ids").combine_chunks().flatten()
    masks = made.data.column("assistant_masks").combine_chunks().flatten()
    return {"tokens": len(tokens), "rows": 0, "targets": sum(masks.to_pylist())}


if __name__ == "__main__":
    job.main(write, count)
