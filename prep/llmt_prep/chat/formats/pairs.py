"""Records of preference data to pairs: with the prompt apart, inside both sides, or as transcripts."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llmt_prep.chat.formats.chats import text_or_messages
from llmt_prep.chat.formats.fields import Names, Record, field, found
from llmt_prep.chat.formats.turns import (
    check_order,
    flags_reader,
    message_reader,
    read_turns,
    system_reader,
    tools_reader,
)
from llmt_prep.chat.messages import Message, PreferencePair, UnfitPair

Messages = tuple[Message, ...]
ReadPair = Callable[[Record], PreferencePair]
Flags = Callable[[Sequence[Any], Sequence[Message]], tuple[bool, ...]]

_QUESTION, _ANSWER = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def explicit_format(names: Names) -> ReadPair:
    """Return a reader of {prompt, chosen, rejected, system?, tools?}, each text or a list of messages.

    A side of messages is what follows the prompt, or the prompt and what follows it.
    """
    fields = [(name, role, field(names, name)) for name, role in
              (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))]  # fmt: skip
    read_turn, system, tools = message_reader(names), system_reader(names), tools_reader(names)
    flags = flags_reader(names)

    def read(record: Record) -> PreferencePair:
        asked, chosen, rejected = (
            text_or_messages(value(record), names, name, role, read_turn) for name, role, value in fields
        )
        trained = [
            _flags(value(record), side, flags) for (*_, value), side in zip(fields[1:], (chosen, rejected), strict=True)
        ]
        prompt = system(record) + asked
        chosen, rejected = (
            _continuation(side, (prompt, asked), name) for side, name in ((chosen, "chosen"), (rejected, "rejected"))
        )
        _require_trained(zip((chosen, rejected), trained, strict=True))
        return _fit(PreferencePair(prompt, chosen, rejected, tools(record)))

    return read


def implicit_format(names: Names) -> ReadPair:
    """Return a reader of {chosen, rejected, system?, tools?}, each a whole conversation as a list of messages.

    The prompt is the longest beginning that both share and that leaves each at least one message.
    """
    sides = [(names.get(name, name), field(names, name)) for name in ("chosen", "rejected")]
    read_turn, system, tools = message_reader(names), system_reader(names), tools_reader(names)
    flags = flags_reader(names)

    def read(record: Record) -> PreferencePair:
        chosen, rejected = (system(record) + read_turns(side(record), place, read_turn) for place, side in sides)
        if chosen == rejected:
            raise _identical()
        border = _border(chosen, rejected)
        trained = [
            _flags(side(record), messages[len(system(record)) :], flags)
            for (_, side), messages in zip(sides, (chosen, rejected), strict=True)
        ]
        prompt, chosen, rejected = chosen[:border], chosen[border:], rejected[border:]
        _require_trained(zip((chosen, rejected), trained, strict=True))
        if not any(message["role"] == "user" for message in prompt):
            raise UnfitPair("differing_prompts", "chosen and rejected have no user message in common")
        for side in (chosen, rejected):
            if side[0]["role"] != "assistant":
                reason = f"chosen and rejected part at message {border}, a {side[0]['role']} message of one of them"
                raise UnfitPair("differing_prompts", f"{reason}; wanted the assistant's")
        return _fit(PreferencePair(prompt, chosen, rejected, tools(record)))

    return read


def _flags(raw: object, messages: Sequence[Message], flags: Flags) -> tuple[bool, ...]:
    return flags(raw, messages) if isinstance(raw, list) else ()


def _require_trained(sides: Iterable[tuple[Sequence[Message], tuple[bool, ...]]]) -> None:
    """Both continuations are compared as a whole; flags of the prompt, which is never trained on, mean nothing."""
    for continuation, trained in sides:
        for message, is_trained in zip(reversed(continuation), reversed(trained), strict=False):
            if message["role"] == "assistant" and not is_trained:
                raise ValueError(
                    "an answer is not to be trained on, and pairs are compared as a whole; remove its flag"
                )


def transcript_format(names: Names) -> ReadPair:
    r"""Return a reader of {chosen, rejected}: texts of turns that begin with "\\n\\nHuman:" or "\\n\\nAssistant:".

    Each is split at its last "\\n\\nAssistant:", and what stands before must be equal. A content is what follows the
    colon without one space, where there is one, up to the next mark: all other white space belongs to it. (In hh-rlhf
    every mark is followed by a space, and turns end right before the next; the few with more space say it themselves.)
    """
    sides = [(names.get(name, name), field(names, name)) for name in ("chosen", "rejected")]

    def read(record: Record) -> PreferencePair:
        texts = [_transcript(side(record), place) for place, side in sides]
        if texts[0] == texts[1]:
            raise _identical()
        (asked, chosen), (other, rejected) = (
            _split_last(text, place) for text, (place, _) in zip(texts, sides, strict=True)
        )
        if asked != other:
            raise UnfitPair("differing_prompts", "chosen and rejected differ before the last assistant turn")
        return _fit(PreferencePair(_turns(asked), _turns(chosen), _turns(rejected)))

    return read


def is_transcript(text: object) -> bool:
    """Whether it begins with the mark of a turn."""
    return isinstance(text, str) and text.startswith((_QUESTION, _ANSWER))


def _continuation(side: Messages, openings: tuple[Messages, ...], name: str) -> Messages:
    for opening in openings:
        if len(side) > len(opening) and side[: len(opening)] == opening:
            side = side[len(opening) :]
            break
    if side[0]["role"] != "assistant":
        reason = f"{name} begins with a {side[0]['role']} message and does not repeat the prompt"
        raise UnfitPair("differing_prompts", f"{reason}; wanted the assistant's")
    return side


def _border(chosen: Messages, rejected: Messages) -> int:
    most = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(most) if chosen[i] != rejected[i]), most)


def _fit(pair: PreferencePair) -> PreferencePair:
    for side in (pair.chosen, pair.rejected):
        check_order(pair.prompt + side)
    if pair.chosen == pair.rejected:
        raise _identical()
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not any(_says_something(message) for message in side):
            raise UnfitPair("empty_answer", f"{name} says nothing; wanted an assistant's message with content")
    return pair


def _says_something(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


def _identical() -> UnfitPair:
    return UnfitPair("identical_sides", "chosen and rejected are the same")


def _transcript(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place} is {'missing or null' if value is None else found(value)}; wanted text")
    return value


def _split_last(text: str, place: str) -> tuple[str, str]:
    """Split into the prompt and the last assistant turn, each with its marks."""
    if not is_transcript(text):
        raise ValueError(f"{place} begins with {found(text)}; wanted the mark of a turn, {_QUESTION!r}")
    border = text.rfind(_ANSWER)
    if text.rfind(_QUESTION) > border:
        raise ValueError(f"{place} ends with a turn of Human; wanted the assistant's")
    if border == 0:
        raise ValueError(f"{place} has no turn before the assistant's; wanted a prompt")
    return text[:border], text[border:]


def _turns(text: str) -> Messages:
    """Messages of a text that begins with a mark."""
    speakers_and_texts = _TURN.split(text)[1:]
    return tuple(
        {"role": _ROLES[speaker], "content": said.removeprefix(" ")}
        for speaker, said in zip(speakers_and_texts[::2], speakers_and_texts[1::2], strict=True)
    )
