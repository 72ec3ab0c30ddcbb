"""Lists of turns to messages: OpenAI's role and content, ShareGPT's from and value, and what stands beside them."""

from collections.abc import Callable, Sequence
from typing import Any

from llmt_prep.chat.formats.fields import Names, Record, field, found
from llmt_prep.chat.formats.tools import tool_calls, tools
from llmt_prep.chat.messages import Message

ROLES = ("system", "developer", "user", "assistant", "tool")

TURN_FIELDS = (
    "role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "reasoning",
    "train", "weight",
)  # fmt: skip
"""What an OpenAI-style message may have; other fields of it are not read."""

SPEAKERS = {
    "system": "system", "developer": "developer", "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "chatbot": "assistant", "chatgpt": "assistant",
    "model": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""Role of each speaker that ShareGPT's `from` may name."""

ReadTurn = Callable[[Any], Message]


def read_turns(turns: object, place: str, read_turn: ReadTurn) -> tuple[Message, ...]:
    """Return the messages of a list of turns.

    Raises:
        ValueError: no list, an empty one, or a turn that cannot be read; ``place`` names the list.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{place} is {'missing or null' if turns is None else found(turns)}; wanted a list of turns")
    messages: list[Message] = []
    try:
        messages.extend(map(read_turn, turns))
    except ValueError as error:
        raise ValueError(f"{place}[{len(messages)}]: {error}") from None
    return tuple(messages)


def message_reader(names: Names) -> ReadTurn:
    """Return a function that reads one OpenAI-style message.

    A content that is a list of text parts becomes their texts, joined by nothing. The content of an assistant's
    message with tool calls may be null, which becomes "". `thinking`, or else `reasoning`, is given as
    `reasoning_content` too: templates look for the one or the other.
    """
    role_key, content_key = names.get("role", "role"), names.get("content", "content")
    is_renamed = (role_key, content_key) != ("role", "content")
    extras = _extras_reader(names)

    def read(turn: Any) -> Message:
        if not isinstance(turn, dict):
            raise ValueError(f"found {found(turn)}; wanted an object with {role_key!r} and {content_key!r}")
        role, content = turn.get(role_key), turn.get(content_key)
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{role_key!r} is {found(role)}; wanted one of {', '.join(ROLES)}")
        if isinstance(content, str) and len(turn) == 2 and not is_renamed:
            return turn  # as nearly every message is, and copying it would take most of the time
        beside = extras(turn, role)
        if content is None and "tool_calls" in beside:
            content = ""
        return {"role": role, "content": _text(content, content_key), **beside}

    return read


def speech_reader(names: Names) -> ReadTurn:
    """Return a function that reads one turn of a ShareGPT conversation; the value of a `function_call` is JSON."""
    from_key, value_key = names.get("from", "from"), names.get("value", "value")

    def read(turn: Any) -> Message:
        if not isinstance(turn, dict):
            raise ValueError(f"found {found(turn)}; wanted an object with {from_key!r} and {value_key!r}")
        speaker, value = turn.get(from_key), turn.get(value_key)
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise ValueError(f"{from_key!r} is {found(speaker)}; wanted one of {', '.join(SPEAKERS)}")
        if not isinstance(value, str):
            raise ValueError(f"{value_key!r} is {found(value)}; wanted text")
        if speaker == "function_call":
            return {"role": "assistant", "content": "", "tool_calls": tool_calls(value, value_key)}
        return {"role": SPEAKERS[speaker], "content": value}

    return read


def flags_reader(names: Names) -> Callable[[Sequence[Any], Sequence[Message]], tuple[bool, ...]]:
    """Return a function that reads which messages may be trained on: () where no turn says anything of it.

    `train` (true, false, 0 or 1) wins over `weight` (0 or 1); a turn without either, or with null, may be.
    """
    train, weight = names.get("train", "train"), names.get("weight", "weight")

    def read(turns: Sequence[Any], messages: Sequence[Message]) -> tuple[bool, ...]:
        if not any(train in turn or weight in turn for turn in turns):
            return ()
        return tuple(
            _is_trained(number, turn.get(weight) if turn.get(train) is None else turn[train], message["role"])
            for number, (turn, message) in enumerate(zip(turns, messages, strict=True))
        )

    return read


def system_reader(names: Names) -> Callable[[Record], tuple[Message, ...]]:
    """Return a function that gives the system message which a record has beside its turns; none where it is empty."""
    system = field(names, "system")

    def read(record: Record) -> tuple[Message, ...]:
        text = system(record)
        if text is None or text == "":
            return ()
        if not isinstance(text, str):
            raise ValueError(f"{names.get('system', 'system')} is {found(text)}; wanted text")
        return ({"role": "system", "content": text},)

    return read


def tools_reader(names: Names) -> Callable[[Record], tuple[Any, ...]]:
    """Return a function that gives the tools which a record describes beside its turns."""
    described = field(names, "tools")
    return lambda record: tools(described(record), names.get("tools", "tools"))


def check_order(messages: Sequence[Message]) -> None:
    """Refuse instructions that are not where a conversation begins.

    Raises:
        ValueError: a system or developer message that is neither the first, nor a developer's right after the
            system's.
    """
    late = [number for number, message in enumerate(messages) if message["role"] in ("system", "developer")]
    if late == [0, 1] and messages[0]["role"] == "system" and messages[1]["role"] == "developer":
        return
    if late not in ([], [0]):
        role = messages[late[-1]]["role"]
        raise ValueError(f"message {late[-1]} is a {role} message; wanted one, and at the beginning")


def _extras_reader(names: Names) -> Callable[[Record, str], dict[str, Any]]:
    calls_key, reasoning_key = (names.get(name, name) for name in ("tool_calls", "reasoning_content"))
    thinking_keys = [names.get(name, name) for name in ("reasoning", "thinking")]
    labels = [(name, names.get(name, name)) for name in ("tool_call_id", "name")]

    def read(turn: Record, role: str) -> dict[str, Any]:
        extras: dict[str, Any] = {name: turn[key] for name, key in labels if turn.get(key) is not None}
        for key in thinking_keys:
            if (thinking := turn.get(key)) is not None:
                extras |= {"reasoning_content": thinking, "thinking": thinking}
        if (reasoning := turn.get(reasoning_key)) is not None:
            extras["reasoning_content"] = reasoning
        if wrong := next((name for name, value in extras.items() if not isinstance(value, str)), None):
            raise ValueError(f"{wrong} is {found(extras[wrong])}; wanted text")
        if calls := turn.get(calls_key):
            extras["tool_calls"] = tool_calls(calls, calls_key)
        if role != "assistant" and (wrong := next((name for name in _OF_ASSISTANTS if extras.get(name)), None)):
            raise ValueError(f"a {role} message has {wrong}; only the assistant's may")
        return extras

    return read


_OF_ASSISTANTS = ("tool_calls", "reasoning_content", "thinking")


def _text(content: object, key: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(map(_text_of_part, content))
    raise ValueError(f"{key!r} is {found(content)}; wanted text, or a list of text parts")


def _text_of_part(part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = f"of type {found(part.get('type'))}" if isinstance(part, dict) else found(part)
    raise ValueError(f'a part of the content is {kind}; wanted {{"type": "text", "text": ...}}')


def _is_trained(number: int, flag: object, role: str) -> bool:
    if flag is None:
        return role == "assistant"
    if not isinstance(flag, (bool, int, float)) or flag not in (0, 1):
        raise ValueError(f"turn {number}: train or weight is {found(flag)}; wanted true, false, 0 or 1")
    if flag and role != "assistant":
        raise ValueError(f"turn {number} is a {role} message to train on; only the assistant's are")
    return bool(flag)
