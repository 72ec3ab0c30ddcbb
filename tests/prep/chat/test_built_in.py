"""The built-in templates against texts that were written out by hand from what the families publish.

What the model writes stands between ⟦ and ⟧.
"""

from pathlib import Path
from typing import Any

import pytest
from generated_chats import tokenizer

from llmt_prep.chat.messages import Conversation
from llmt_prep.chat.render import render
from llmt_prep.chat.template import load_template

SYSTEM = {"role": "system", "content": " Be kind.\n"}
CHAT = (
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "\nHello! "},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
)
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds <n>.", "parameters": {"n": "integer"}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"n": 1, "é": "ü"}}}
CALLS = (
    {"role": "user", "content": "Add one."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": '"2"'},
    {"role": "assistant", "content": "Two."},
)
TWICE = (CALLS[0], {"role": "assistant", "content": "Now:", "tool_calls": [CALL, CALL]}, CALLS[2], CALLS[2], CALLS[3])

QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "add", "description": "Adds <n>.", "parameters": {"n": "integer"}}}'
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call><|im_end|>\n"
)
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"n": 1, "é": "ü"}}\n</tool_call>'
QWEN_RESULT = '<tool_response>\n"2"\n</tool_response>'

PLAIN = {
    "chatml": (
        "<|im_start|>system\n Be kind.\n<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
        "<|im_start|>assistant\n⟦\nHello! <|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n⟦So long<|im_end|>⟧\n"
    ),
    "llama-2": (
        "<s>[INST] <<SYS>>\n Be kind.\n\n<</SYS>>\n\n Hi [/INST]⟦ Hello! </s>⟧<s>[INST] Bye [/INST]⟦ So long </s>⟧"
    ),
    "llama-3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello!<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦So long<|eot_id|>⟧"
    ),
    "llama-3.1": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello!<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦So long<|eot_id|>⟧"
    ),
    "mistral": "<s>[INST]  Hi\n[/INST]⟦ Hello!</s>⟧[INST]  Be kind.\n\n\nBye[/INST]⟦ So long</s>⟧",
    "phi-3": (
        "<|system|>\n Be kind.\n<|end|>\n<|user|>\n Hi\n<|end|>\n<|assistant|>\n⟦\nHello! <|end|>⟧\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n⟦So long<|end|>⟧\n<|endoftext|>"
    ),
    "phi-4": (
        "<|im_start|>system<|im_sep|> Be kind.\n<|im_end|><|im_start|>user<|im_sep|> Hi\n<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦\nHello! <|im_end|>⟧<|im_start|>user<|im_sep|>Bye<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦So long<|im_end|>⟧"
    ),
    "qwen3": (
        "<|im_start|>system\n Be kind.\n<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
        "<|im_start|>assistant\n⟦\nHello! <|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦So long<|im_end|>⟧\n"
    ),
    "tulu": (
        "<|system|>\n Be kind.\n\n<|user|>\n Hi\n\n<|assistant|>\n⟦\nHello! <|end_of_text|>⟧\n"
        "<|user|>\nBye\n<|assistant|>\n⟦So long<|end_of_text|>⟧"
    ),
}
PLAIN["qwen2.5"] = PLAIN["chatml"]
PLAIN["llama-3.2"] = PLAIN["llama-3.1"]

WITHOUT_SYSTEM = {
    "gemma": (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello!<end_of_turn>⟧\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦So long<end_of_turn>⟧\n"
    ),
    "llama-2": "<s>[INST] Hi [/INST]⟦ Hello! </s>⟧<s>[INST] Bye [/INST]⟦ So long </s>⟧",
    "llama-3.1": PLAIN["llama-3.1"].replace("Be kind.", ""),
    "mistral": "<s>[INST]  Hi\n[/INST]⟦ Hello!</s>⟧[INST] Bye[/INST]⟦ So long</s>⟧",
    "qwen2.5": PLAIN["qwen2.5"].replace(
        " Be kind.\n", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ),
    "qwen3": PLAIN["qwen3"].replace("<|im_start|>system\n Be kind.\n<|im_end|>\n", ""),
}

WITH_TOOLS = {
    "llama-3.1": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
        "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
        'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
        "argument name and its value}.Do not use variables.\n\n"
        '{\n    "type": "function",\n    "function": {\n        "name": "add",\n        "description": "Adds <n>.",\n'
        '        "parameters": {\n            "n": "integer"\n        }\n    }\n}\n\nAdd one.<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "add", "parameters": {"n": 1, "é": "ü"}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"\\"2\\""<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Two.<|eot_id|>⟧"
    ),
    "mistral": (
        '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "add", "description": "Adds <n>.", '
        '"parameters": {"n": "integer"}}}][/AVAILABLE_TOOLS][INST] Add one.[/INST]'
        '⟦[TOOL_CALLS] [{"name": "add", "arguments": {"n": 1, "é": "ü"}, "id": "abcdefghi"}]</s>⟧'
        '[TOOL_RESULTS] {"content": "2", "call_id": "abcdefghi"}[/TOOL_RESULTS]⟦ Two.</s>⟧'
    ),
    "qwen2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n"
        f"{QWEN_TOOLS}<|im_start|>user\nAdd one.<|im_end|>\n<|im_start|>assistant\n⟦{QWEN_CALL}<|im_end|>⟧\n"
        f"<|im_start|>user\n{QWEN_RESULT}<|im_end|>\n<|im_start|>assistant\n⟦Two.<|im_end|>⟧\n"
    ),
    "qwen3": (
        f"<|im_start|>system\n{QWEN_TOOLS}<|im_start|>user\nAdd one.<|im_end|>\n"
        f"<|im_start|>assistant\n⟦{QWEN_CALL}<|im_end|>⟧\n<|im_start|>user\n{QWEN_RESULT}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Two.<|im_end|>⟧\n"
    ),
}


def marked(folder: Path, name: str, *messages: dict[str, Any], tools: tuple[dict[str, Any], ...] = ()) -> str:
    """The text, with what the model writes between brackets."""
    text, turns = render(load_template(name, tokenizer(folder, name)), Conversation(messages, tools))
    for turn in reversed(turns):
        text = f"{text[: turn.start]}⟦{text[turn.start : turn.stop]}⟧{text[turn.stop :]}"
    return text


@pytest.mark.parametrize("name", PLAIN)
def test_a_chat_with_a_system_prompt_is_as_published(tmp_path, name):
    assert marked(tmp_path, name, SYSTEM, *CHAT) == PLAIN[name]


@pytest.mark.parametrize("name", WITHOUT_SYSTEM)
def test_a_chat_without_a_system_prompt_is_as_published(tmp_path, name):
    assert marked(tmp_path, name, *CHAT) == WITHOUT_SYSTEM[name]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_calls_and_results_are_as_published(tmp_path, name):
    assert marked(tmp_path, name, *CALLS, tools=(TOOL,)) == WITH_TOOLS[name]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_several_calls_follow_the_text_and_several_results_share_a_turn(tmp_path, name):
    text = marked(tmp_path, name, *TWICE, tools=(TOOL,))
    assert f"<|im_start|>assistant\n⟦Now:\n{QWEN_CALL}\n{QWEN_CALL}<|im_end|>⟧\n" in text
    assert f"<|im_start|>user\n{QWEN_RESULT}\n{QWEN_RESULT}<|im_end|>\n<|im_start|>assistant\n" in text


def test_mistral_lists_several_calls(tmp_path):
    call = '{"name": "add", "arguments": {"n": 1, "é": "ü"}, "id": "abcdefghi"}'
    assert f"⟦[TOOL_CALLS] [{call}, {call}]</s>⟧[TOOL_RESULTS]" in marked(tmp_path, "mistral", *TWICE, tools=(TOOL,))


def test_qwen3_shows_the_thinking_behind_the_last_question_alone(tmp_path):
    answers = [
        {"role": "assistant", "content": f"Answer {number}", "reasoning_content": f"\nThought {number}\n"}
        for number in range(4)
    ]
    questions = [{"role": "user", "content": f"Question {number}"} for number in range(2)]
    chat = (questions[0], answers[0], questions[1], answers[1], CALLS[2], answers[2], CALLS[2], answers[3])
    text = marked(tmp_path, "qwen3", *chat)
    assert "<|im_start|>assistant\n⟦Answer 0<|im_end|>⟧" in text
    for number in (1, 2, 3):
        shown = f"⟦<think>\nThought {number}\n</think>\n\nAnswer {number}<|im_end|>⟧"
        assert f"<|im_start|>assistant\n{shown}" in text


def test_qwen3_finds_thinking_in_the_content(tmp_path):
    content = "<think>\nHm.\n</think>\n\nYes"
    turn = {"role": "assistant", "content": content}
    text = marked(tmp_path, "qwen3", CHAT[0], turn, CHAT[2], turn)
    assert "<|im_start|>assistant\n⟦Yes<|im_end|>⟧" in text
    assert text.endswith(f"<|im_start|>assistant\n⟦{content}<|im_end|>⟧\n")


@pytest.mark.parametrize(
    ("name", "messages", "wanted"),
    [
        ("chatml", CALLS, "no place for tool calls"),
        ("gemma", (SYSTEM, *CHAT), "without a system message"),
        ("gemma", CALLS, "tool calls"),
        ("llama-2", (CHAT[0], CHAT[0]), "user and assistant in turns"),
        ("llama-2", CALLS, "no place for tool calls"),
        ("llama-3", CALLS, "no place for tool calls; llama-3.1 has"),
        ("llama-3.1", TWICE, "one tool at a time"),
        ("mistral", (CHAT[0], CHAT[0]), "user and assistant in turns"),
        ("mistral", (CALLS[0], CALLS[1], {"role": "tool", "content": "2"}), "ids of nine characters"),
        ("phi-3", CALLS, "only the roles"),
        ("phi-4", CALLS, "only the roles"),
        ("qwen2.5", ({"role": "developer", "content": ""}, *CHAT), "only the roles"),
        ("qwen3", ({"role": "developer", "content": ""}, *CHAT), "only the roles"),
        ("tulu", CALLS, "only the roles"),
    ],
)
def test_what_a_family_does_not_know_is_refused_and_not_dropped(tmp_path, name, messages, wanted):
    with pytest.raises(ValueError, match=wanted):
        marked(tmp_path, name, *messages)


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama-2", "llama-3", "phi-3", "phi-4", "tulu"])
def test_a_family_without_tools_refuses_them(tmp_path, name):
    with pytest.raises(ValueError, match="no place for tools"):
        marked(tmp_path, name, *CHAT, tools=(TOOL,))
