"""Records of instruction data to conversations: messages, ShareGPT, Alpaca, prompt and completion."""

from collections.abc import Callable
from typing import Any

from llmt_prep.chat.formats.fields import Names, Record, field, found
from llmt_prep.chat.formats.turns import (
    ReadTurn,
    check_order,
    flags_reader,
    message_reader,
    read_turns,
    speech_reader,
    system_reader,
    tools_reader,
)
from llmt_prep.chat.messages import Conversation, Message

ReadChat = Callable[[Record], Conversation]


def messages_format(names: Names) -> ReadChat:
    """Return a reader of {messages: [{role, content, ...}], system?, tools?}."""
    return _turns_format(names, "messages", message_reader(names))


def sharegpt_format(names: Names) -> ReadChat:
    """Return a reader of {conversations: [{from, value, train?, weight?}], system?, tools?}."""
    return _turns_format(names, "conversations", speech_reader(names))


def alpaca_format(names: Names) -> ReadChat:
    r"""Return a reader of {instruction, input?, output, system?, history?}.

    Instruction and input are one user message: the instruction alone where the input is empty, null or missing, else
    instruction + "\\n\\n" + input (and the input alone where the instruction is empty). ``history`` is a list of
    [user, assistant] texts, the turns before.
    """
    instruction, given, output, history = (field(names, name) for name in ("instruction", "input", "output", "history"))
    system = system_reader(names)

    def read(record: Record) -> Conversation:
        asked = _text(instruction(record), names, "instruction")
        context = given(record)
        context = "" if context is None else _text(context, names, "input")
        question = "\n\n".join(filter(None, (asked, context)))
        answer = _text(output(record), names, "output")
        last = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return Conversation((*system(record), *_history(history(record), names), *last))

    return read


def prompt_completion_format(names: Names) -> ReadChat:
    """Return a reader of {prompt, completion, system?, tools?}, each text or a list of messages.

    Texts are one user and one assistant message; both texts, without system and tools, are plain too. Of messages only
    the completion's are trained on.
    """
    prompt, completion = field(names, "prompt"), field(names, "completion")
    read_turn, flags = message_reader(names), flags_reader(names)
    system, tools = system_reader(names), tools_reader(names)

    def read(record: Record) -> Conversation:
        asked, answer = prompt(record), completion(record)
        before = (*system(record), *text_or_messages(asked, names, "prompt", "user", read_turn))
        after = text_or_messages(answer, names, "completion", "assistant", read_turn)
        if after[0]["role"] != "assistant":
            raise ValueError(f"completion begins with a {after[0]['role']} message; wanted the assistant's")
        check_order(before + after)
        described = tools(record)
        if isinstance(asked, str) and isinstance(answer, str):
            return Conversation(before + after, described, (), is_plain=len(before) == 1 and not described)
        is_trained = flags(answer, after) if isinstance(answer, list) else ()
        is_trained = is_trained or tuple(message["role"] == "assistant" for message in after)
        return Conversation(before + after, described, (False,) * len(before) + is_trained)

    return read


def text_or_messages(value: object, names: Names, name: str, role: str, read_turn: ReadTurn) -> tuple[Message, ...]:
    """Return the messages of a field that is either a list of them or a text, which is one message of ``role``."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    place = names.get(name, name)
    if not isinstance(value, list):
        what = "missing or null" if value is None else found(value)
        raise ValueError(f"{place} is {what}; wanted text or a list of messages")
    return read_turns(value, place, read_turn)


def _turns_format(names: Names, name: str, read_turn: ReadTurn) -> ReadChat:
    turns, place = field(names, name), names.get(name, name)
    system, tools, flags = system_reader(names), tools_reader(names), flags_reader(names)

    def read(record: Record) -> Conversation:
        said = turns(record)
        messages = read_turns(said, place, read_turn)
        is_trained = flags(said, messages)
        if before := system(record):
            messages = before + messages
            is_trained = is_trained and (False, *is_trained)
        check_order(messages)
        return Conversation(messages, tools(record), is_trained)

    return read


def _history(history: Any, names: Names) -> list[Message]:
    if history is None:
        return []
    place = names.get("history", "history")
    if not isinstance(history, list):
        raise ValueError(f"{place} is {found(history)}; wanted a list of [user, assistant] texts")
    messages: list[Message] = []
    for number, turn in enumerate(history):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise ValueError(f"{place}[{number}] is {found(turn)}; wanted [user, assistant], two texts")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def _text(value: object, names: Names, name: str) -> str:
    if not isinstance(value, str):
        what = "missing or null" if value is None else found(value)
        raise ValueError(f"{names.get(name, name)} is {what}; wanted text")
    return value
