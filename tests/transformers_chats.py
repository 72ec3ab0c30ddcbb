"""What transformers makes of conversations. Run as a script: jobs in, JSON out; one process for all of a test run.

A job is {folder, template or null, date, conversations: [{messages, tools}]}; its answer holds for each conversation
{text, ids, mask}.
"""

import datetime
import json
import sys
from typing import Any

import transformers
from transformers.utils import chat_template_utils


def answer(job: dict[str, Any]) -> list[dict[str, Any]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
    today = datetime.datetime.fromisoformat(job["date"])
    chat_template_utils.datetime = type("Clock", (), {"now": staticmethod(lambda: today)})
    return [one(tokenizer, job["template"], conversation) for conversation in job["conversations"]]


def one(tokenizer: Any, template: str | None, conversation: dict[str, Any]) -> dict[str, Any]:
    messages = conversation["messages"]
    arguments = {"tools": conversation["tools"] or None, "chat_template": template}
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **arguments
    )
    return {
        "text": tokenizer.apply_chat_template(messages, tokenize=False, **arguments),
        "ids": encoded["input_ids"],
        "mask": encoded["assistant_masks"],
    }


if __name__ == "__main__":
    json.dump([answer(job) for job in json.load(sys.stdin)], sys.stdout)
