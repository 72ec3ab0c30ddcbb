"""What a template does to conversations before any of the user's is rendered: what it drops, doubles and refuses."""

import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from llmt_prep.chat.messages import Conversation, Message
from llmt_prep.chat.render import Rendered, Turn, render, text_of
from llmt_prep.chat.template import Template
from llmt_shared.errors import ConfigError


class Finding(NamedTuple):
    """One thing that a template does to one probe."""

    probe: str
    """Name of the conversation, in `PROBES`."""
    fault: Literal["refuses", "unclear", "drops", "trims", "doubles", "adds", "endless"]
    """It raises an exception; it cannot be told what the model writes; content is not in the text, or without its
    outer whitespace, or twice; a turn has text before its content; a turn does not end with a control token."""
    sentence: str
    """To read, without the name of the probe."""


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


_WEATHER = {
    "type": "function",
    "function": {
        "name": "find_weather",
        "description": "Looks out of the window.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
_CALL = {"id": "call12345", "type": "function", "function": {"name": "find_weather", "arguments": {"town": "Ulm"}}}

TWO_TURNS = Conversation((_user("First question"), _assistant("First answer")))

PROBES = {
    "two turns": TWO_TURNS,
    "six turns": Conversation(
        (
            *TWO_TURNS.messages,
            *(_user("Second question"), _assistant("Second answer")),
            *(_user("Third question"), _assistant("Third answer")),
        )
    ),
    "system prompt": Conversation(({"role": "system", "content": "Be brief"}, *TWO_TURNS.messages)),
    "developer prompt": Conversation(({"role": "developer", "content": "Be brief"}, *TWO_TURNS.messages)),
    "outer whitespace": Conversation(
        ({"role": "system", "content": " \nBe brief\n "}, _user(" \nQuestion\n "), _assistant(" \nAnswer\n "))
    ),
    "unicode": Conversation((_user("¿Qué? 何 \U0001f642"), _assistant("नमस्ते e\u0301 \u2028 \u200d"))),
    "empty answer": Conversation((_user("Question"), _assistant(""), _user("Another question"), _assistant("Answer"))),
    "two users in a row": Conversation((_user("First question"), _user("Second question"), _assistant("Answer"))),
    "thinking": Conversation(
        (
            *(_user("First question"), _assistant("First answer", reasoning_content="First thought")),
            *(_user("Second question"), _assistant("Second answer", reasoning_content="Second thought")),
        )
    ),
    "tools": Conversation(
        (
            _user("Is it raining?"),
            _assistant("", tool_calls=[_CALL]),
            {"role": "tool", "name": "find_weather", "tool_call_id": "call12345", "content": "Pouring"},
            _assistant("It is"),
        ),
        tools=(_WEATHER,),
    ),
    "text beside a tool call": Conversation(
        (
            _user("Is it raining?"),
            _assistant("Wait", tool_calls=[_CALL]),
            {"role": "tool", "name": "find_weather", "tool_call_id": "call12345", "content": "Pouring"},
            _assistant("It is"),
        ),
        tools=(_WEATHER,),
    ),
}
"""What templates are tried on; every content is in its conversation once."""


def lint(template: Template) -> tuple[Finding, ...]:
    """Try a template on every probe; nothing is found where all of each is in the text once, and turns are clear.

    Conversations that describe tools are rendered with the template for them, where there is one.
    """
    return tuple(finding for name, probe in PROBES.items() for finding in _findings(template, name, probe))


def told(template: Template) -> list[str]:
    """Return one line for each probe that something is found with: the first finding, and how many more there are."""
    findings: dict[str, list[Finding]] = {}
    for finding in lint(template):
        findings.setdefault(finding.probe, []).append(finding)
    return [
        f"chat template {template.name}: {probe}: {first.sentence}" + (f" (and {len(more)} more)" if more else "")
        for probe, (first, *more) in findings.items()
    ]


def require_usable(template: Template) -> None:
    """Raise ConfigError where a template leaves it open even for one question what the model writes."""
    way_out = "use a built-in template, or put {% generation %} and {% endgeneration %} around what the model writes"
    try:
        rendered = render(template, TWO_TURNS)
    except ValueError as error:
        raise ConfigError(f"{error}; {way_out}") from None
    turn = rendered.turns[0]
    written = rendered.text[turn.start : turn.stop]
    answer = TWO_TURNS.messages[1]["content"]
    if answer not in written:
        raise ConfigError(
            f"chat template {template.name}: it gives {written[:60]!r} as what the model writes in turn 2 (assistant), "
            f"whose content is {answer!r}; {way_out}"
        )
    if not template.has_generation_marks and _before(written, answer) and _asks_nothing(template):
        raise ConfigError(
            f"chat template {template.name}: it has no prompt for an answer (add_generation_prompt changes nothing): "
            f"the header {_before(written, answer)!r} of turn 2 (assistant) cannot be told from its content; {way_out}"
        )


def _asks_nothing(template: Template) -> bool:
    question = Conversation(TWO_TURNS.messages[:1])
    return text_of(template, question) == text_of(template, question, asks=True)


def _before(written: str, content: str) -> str:
    return written[: written.find(content)].strip()


def _findings(template: Template, name: str, probe: Conversation) -> Iterator[Finding]:
    try:
        text = text_of(template, probe)
    except ValueError as error:
        yield Finding(name, "refuses", f"it refuses: {_reason(template, error)}")
        return
    yield from _in_text(name, probe, text)
    yield from _bos(template, name, text)
    try:
        rendered = render(template, probe)
    except ValueError as error:
        yield Finding(name, "unclear", _reason(template, error))
        return
    for turn in rendered.turns:
        yield from _in_turn(template, name, probe.messages[turn.message], rendered, turn)


def _reason(template: Template, error: ValueError) -> str:
    return str(error).removeprefix(f"chat template {template.name}: ")


def _in_text(name: str, probe: Conversation, text: str) -> Iterator[Finding]:
    for number, message in enumerate(probe.messages, start=1):
        where = f"message {number} ({message['role']})"
        yield from _content_in_text(name, where, message["content"], text)
        if (thought := message.get("reasoning_content")) and thought not in text:
            yield Finding(name, "drops", f"it drops the thinking of {where}")
        if "tool_calls" in message and "Ulm" not in text:
            yield Finding(name, "drops", f"it drops the tool call of {where}")
    if probe.tools and "Looks out" not in text:
        yield Finding(name, "drops", "it drops the descriptions of the tools")


def _content_in_text(name: str, where: str, content: str, text: str) -> Iterator[Finding]:
    core = content.strip()
    num_written = text.count(core) if core else 1
    if num_written == 0:
        yield Finding(name, "drops", f"it drops the content of {where}")
    elif num_written > 1:
        yield Finding(name, "doubles", f"it writes the content of {where} {num_written} times")
    elif content not in text and json.dumps(content)[1:-1] not in text:
        yield Finding(name, "trims", f"it drops whitespace around the content of {where}")


def _bos(template: Template, name: str, text: str) -> Iterator[Finding]:
    bos = template.special_tokens.get("bos_token")
    if bos and bos * 2 in text:  # not merely twice: some families begin every exchange, or every turn, with it
        yield Finding(name, "doubles", "it writes the BOS token twice in a row")


def _in_turn(template: Template, name: str, message: Message, rendered: Rendered, turn: Turn) -> Iterator[Finding]:
    where = f"turn {turn.message + 1} (assistant)"
    written = rendered.text[turn.start : turn.stop]
    core = message["content"].strip()
    if core and core not in written:
        yield Finding(name, "drops", f"what the model writes in {where} is without its content")
    elif core and "reasoning_content" not in message and (head := _before(written, core)):
        yield Finding(name, "adds", f"what the model writes in {where} begins with {head!r} before its content")
    if not written.endswith(template.control_tokens or ("",)):
        yield Finding(name, "endless", f"{where} does not end with a control token of the tokenizer")
