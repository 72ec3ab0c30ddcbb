"""A tokenizer and a template for chats, and conversations to try them on."""

import json
from pathlib import Path
from typing import Any

import small_tokenizers
from tokenizers import AddedToken

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Write a byte-level tokenizer with chat markers and, if said, a template of its own."""
    tokenizer = small_tokenizers.byte_level_bpe()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    config = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return small_tokenizers.save(tokenizer, folder, **config, **({"chat_template": template} if template else {}))


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    """A record of turns by user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": each} for n, each in enumerate(contents)]} | more


def write_lines(path: Path, records: list[Any]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(each) + "\n" for each in records), "utf-8")
    return path
