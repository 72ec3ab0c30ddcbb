"""Small conversations, a tokenizer that has every family's control tokens, and templates as tokenizers bring them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from small_tokenizers import byte_level_bpe, save
from tokenizers import AddedToken

from llmt_prep.chat.messages import Conversation
from llmt_prep.tokenizer import LoadedTokenizer, load_tokenizer

BOS_AND_EOS = {
    "chatml": (None, "<|im_end|>"),
    "gemma": ("<bos>", "<eos>"),
    "llama-2": ("<s>", "</s>"),
    "llama-3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama-3.1": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama-3.2": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "phi-3": ("<s>", "<|endoftext|>"),
    "phi-4": ("<|endoftext|>", "<|im_end|>"),
    "qwen2.5": (None, "<|im_end|>"),
    "qwen3": (None, "<|im_end|>"),
    "tulu": ("<|begin_of_text|>", "<|end_of_text|>"),
}
"""As the families' tokenizers name them."""

CONTROL_TOKENS = (
    "<s>", "</s>", "<bos>", "<eos>", "<|im_end|>", "<|im_sep|>", "<start_of_turn>", "<end_of_turn>",
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>",
    "<|system|>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip

OF_TOKENIZERS = {
    "chatml without marks": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
        "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "answers that end with EOS": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
        "{% elif m.role == 'system' %}{{ m.content | tojson }}{% else %}{{ ' ' ~ m.content.strip() ~ eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "macros, namespaces and slices": (
        "{%- macro turn(role, content='') -%}<|start_header_id|>{{ role }}<|end_header_id|>\n\n{{ content }}<|eot_id|>"
        "{%- endmacro -%}\n"
        "{%- set ns = namespace(count=0, names=[]) %}\n"
        "{%- for m in messages[:2][::-1] if m.role != 'assistant' %}\n"
        "    {%- set ns.count = ns.count + 1 %}\n"
        "    {%- set ns.names = ns.names + [m.role | upper] %}\n"
        "{%- endfor %}\n"
        "{{- 'First %d: %s, ' % (ns.count, ns.names | unique | join(' and ')) }}\n"
        "{{- dict(a=1, b=[2, none]) | tojson(indent=2) ~ '{:>5}|'.format(ns.count * 2) }}\n"
        "{%- for m in messages %}\n"
        "    {%- if loop.index > 900 %}{% break %}{% endif %}\n"
        "    {{- turn(m.role, m.content | replace('QQQ', 'Q')) }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt -%}\n"
        "<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}\n"
        "{%- endif -%}\n"
    ),
}
"""No built-in ones; none has marks, and each lets it be told what the model writes."""

MANY_TOOLS = ("llama-3.1", "llama-3.2", "mistral", "qwen2.5", "qwen3")
"""Built-in templates that show tools."""

_PIECES = [
    " ", "\n", "\n\n", "\t", "  ", "a", "The quick brown fox", "naïve café", "日本語", "\U0001f642", "e\u0301",
    "\u2028", "\u200b", "\x85", "{{ x }}", "{% raw %}", "<think>", "</think>", '"quoted"', "\\n", "&<>'", "#", "1", ".",
]  # fmt: skip


TEXTS = st.builds(
    "".join, st.lists(st.sampled_from(_PIECES), max_size=5) | st.tuples(st.sampled_from(_PIECES), st.text(max_size=8))
).filter(lambda text: not any(token in text for token in CONTROL_TOKENS))
"""Contents: unicode, whitespace at the ends, never a control token."""

_VALUES = st.sampled_from([None, -1, 0.5, 10**20, [True, False], {"": "<é>"}])
_CONTENTS_BESIDE_CALLS = st.just("") | TEXTS
_LENGTHS = st.sampled_from([1, 1, 2, 2, 3, 8])


def tokenizer(folder: Path, name: str, **config: object) -> LoadedTokenizer:
    """The tokenizer for a built-in template, or for another of its own with a BOS."""
    backend = byte_level_bpe()
    backend.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    bos, eos = BOS_AND_EOS.get(name, ("<s>", "</s>"))
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    return load_tokenizer(str(save(backend, folder, **tokens, **config)))


@st.composite
def conversations(draw: st.DrawFn, name: str) -> Conversation:
    """Conversations that a template takes."""
    messages: list[dict[str, Any]] = []
    if name != "gemma" and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    tools = draw(st.lists(_tools(), max_size=2)) if name in MANY_TOOLS else []
    for _ in range(draw(_LENGTHS)):
        messages.append({"role": "user", "content": draw(TEXTS)})
        if tools and draw(st.booleans()):
            messages += draw(_calls(name))
        answer = {"role": "assistant", "content": draw(TEXTS)}
        if draw(st.booleans()) and name == "qwen3":
            answer["reasoning_content"] = draw(TEXTS)
        messages.append(answer)
    return Conversation(tuple(messages), tuple(tools))


@st.composite
def _tools(draw: st.DrawFn) -> Mapping[str, Any]:
    parameters = {"type": "object", "properties": {draw(TEXTS): {"type": "string", "description": draw(TEXTS)}}}
    function = {"name": "look_up", "description": draw(TEXTS), "parameters": parameters}
    return {"type": "function", "function": function}


@st.composite
def _calls(draw: st.DrawFn, name: str) -> Sequence[dict[str, Any]]:
    """A turn that calls tools, and their results."""
    calls, results = [], []
    for number in range(1 if name.startswith("llama") else draw(st.integers(1, 2))):
        identity = f"call{number:05}"
        arguments = {"word": draw(TEXTS), "n": draw(_VALUES)}
        calls.append({"id": identity, "type": "function", "function": {"name": "look_up", "arguments": arguments}})
        results.append({"role": "tool", "tool_call_id": identity, "content": draw(TEXTS)})
    content = draw(_CONTENTS_BESIDE_CALLS) if name.startswith("qwen") else ""
    return [{"role": "assistant", "content": content, "tool_calls": calls}, *results]


def as_json(conversation: Conversation) -> dict[str, Any]:
    """What another process reads."""
    return json.loads(json.dumps({"messages": conversation.messages, "tools": conversation.tools}))
