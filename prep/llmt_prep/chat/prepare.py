"""From a record to the text that is tokenized and the characters of it that are targets, or why there is none."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson

from llmt_prep.chat.formats import reader
from llmt_prep.chat.messages import Conversation, Message, PreferencePair
from llmt_prep.chat.render import Rendered, Turn, render
from llmt_prep.chat.template import Template
from llmt_prep.control import control_string_counter, control_string_finder, seam_finder
from llmt_prep.store import hash_text
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_shared.order import mix


@dataclass(frozen=True)
class ChatSettings:
    """Whatever makes text and targets of records; JSON can hold it."""

    kind: Literal["sft", "preference"]
    format: str
    fields: tuple[tuple[str, str], ...]
    template: str
    """Its text."""
    tools_template: str | None = None
    """The text of the template for conversations with tools, where there is one of its own."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    system: str | None = None
    system_rate: float = 1.0
    special_tokens_in_text: Literal["as_text", "error", "keep"] = "as_text"
    refused: tuple[str, ...] = ()
    """Which of `store.LEFT_OUT` stop the run."""


Span = tuple[int, int]
"""First character and one past the last."""


class Prepared(NamedTuple):
    """A conversation or a pair, ready to be tokenized."""

    record: int
    texts: tuple[str, ...]
    """One, or the pair's chosen and rejected side."""
    spans: tuple[tuple[Span, ...], ...]
    """Of each text, what is a target; ascending."""
    hash: int
    """Of all messages; of a pair, of the prompt."""
    turns: int


class ControlString(ValueError):  # noqa: N818  what a record has, for settings to judge
    """A message holds the string of a control token."""


Prepare = Callable[[int, dict[str, Any]], Prepared]
"""(record number, record) -> what is tokenized; a ValueError has the reason why nothing is."""

_SYSTEM_SALT = np.uint64(0x6C6C6D74_7379736D)


def preparing(settings: ChatSettings, template: Template, tokenizer: LoadedTokenizer) -> Prepare:
    """Return what prepares the records of a source.

    Its function raises UnfitPair, ControlString, or another ValueError for a bad record.
    """
    read = reader(settings.format, dict(settings.fields))
    check = _content_check(tokenizer) if settings.special_tokens_in_text != "keep" else None

    def prepare(record: int, value: dict[str, Any]) -> Prepared:
        found = read(value)
        sides = _sides(found, settings)
        rendered = []
        for side in sides:
            text = _plain(side, tokenizer) if side.is_plain else render(template, side)
            if check is not None:
                check(side, text.text, template)
            rendered.append(text)
        first = len(sides[0].messages) - len(found.chosen) if isinstance(found, PreferencePair) else 0
        return Prepared(
            record=record,
            texts=tuple(each.text for each in rendered),
            spans=tuple(_spans(*each, first, settings) for each in zip(rendered, sides, strict=True)),
            hash=_hash(found),
            turns=sum(len(side.messages) for side in sides),
        )

    return prepare


def _sides(found: Conversation | PreferencePair, settings: ChatSettings) -> tuple[Conversation, ...]:
    """The conversations to render, with the system message that they lack."""
    if isinstance(found, Conversation):
        system = () if found.is_plain else _system(found, found.messages, settings)
        flags = (*(False for _ in system), *found.is_trained) if found.is_trained else ()
        return (found._replace(messages=(*system, *found.messages), is_trained=flags),)
    prompt = (*_system(found, found.prompt, settings), *found.prompt)
    return tuple(Conversation((*prompt, *answer), found.tools) for answer in (found.chosen, found.rejected))


def _system(
    found: Conversation | PreferencePair, messages: Sequence[Message], settings: ChatSettings
) -> tuple[Message, ...]:
    """The system message that it gets, if any; ``messages`` are those that a model would see."""
    if settings.system is None or (messages and messages[0]["role"] in ("system", "developer")):
        return ()
    drawn = int(mix(np.array([_hash(found)], np.uint64) ^ _SYSTEM_SALT)[0])
    return ({"role": "system", "content": settings.system},) if drawn < settings.system_rate * 2**64 else ()


def _spans(rendered: Rendered, side: Conversation, first: int, settings: ChatSettings) -> tuple[Span, ...]:
    """What is a target of a text; ``first`` is the first message that may be one."""
    if settings.train_on == "all":
        return ((0, len(rendered.text)),)
    turns = [turn for turn in rendered.turns if turn.message >= first]
    turns = turns[-1:] if settings.train_on == "last" else turns
    return tuple((turn.start, turn.stop) for turn in turns if not side.is_trained or side.is_trained[turn.message])


def _plain(side: Conversation, tokenizer: LoadedTokenizer) -> Rendered:
    """A prompt and its completion as they stand, between BOS, where the tokenizer begins with it, and EOS."""
    begin = _token(tokenizer, tokenizer.bos_id) if tokenizer.adds_bos else ""
    prompt, completion = (message["content"] for message in side.messages)
    answer = completion + _token(tokenizer, tokenizer.eos_id)
    text = begin + prompt + answer
    return Rendered(text, (Turn(1, len(text) - len(answer), len(text)),))


def _token(tokenizer: LoadedTokenizer, token_id: int | None) -> str:
    return "" if token_id is None else str(tokenizer.backend.id_to_token(token_id))


def _hash(found: Conversation | PreferencePair) -> int:
    messages = found.messages if isinstance(found, Conversation) else found.prompt
    return hash_text(orjson.dumps(messages, default=str, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS))


def _content_check(tokenizer: LoadedTokenizer) -> Callable[[Conversation, str, Template], None]:
    """Return what raises ControlString where a message holds the string of a control token, or would make one."""
    find, count = control_string_finder(tokenizer.control_tokens), control_string_counter(tokenizer.control_tokens)
    could_join = seam_finder(tokenizer.control_tokens)

    def check(side: Conversation, text: str, template: Template) -> None:
        contents = [*_contents(side.messages), *_strings(side.tools)]
        if (string := find(("" if side.is_plain else "\x00").join(contents))) is not None:
            raise ControlString(f"a message holds the control string {string!r}")
        if side.is_plain or not any(map(could_join, contents)):
            return
        apart = side._replace(messages=tuple(_set_apart(message) for message in side.messages))
        if count(text) != count(render(template, apart).text):
            raise ControlString("a message becomes a control token together with the template's text beside it")

    return check


def _set_apart(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": f"x{content}x"} if isinstance(content, str) and content else message


def _contents(messages: Sequence[Message]) -> Iterator[str]:
    """All strings of messages but their roles."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, str) and len(message) == 2:  # most have nothing else
            yield content
        else:
            yield from _strings({key: value for key, value in message.items() if key != "role"})


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield key
            yield from _strings(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _strings(each)
