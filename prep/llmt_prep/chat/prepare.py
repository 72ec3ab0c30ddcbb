"""From a record to the text that is tokenized and the characters of it that are targets, or why there is none."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson

from llmt_prep.chat.forgery import content_check
from llmt_prep.chat.formats import reader
from llmt_prep.chat.messages import Conversation, Message, PreferencePair, UnfitPair
from llmt_prep.chat.render import Rendered, Turn, render
from llmt_prep.chat.template import Template
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


Prepare = Callable[[int, dict[str, Any]], Prepared]
"""(record number, record) -> what is tokenized; a ValueError has the reason why nothing is."""

_SYSTEM_SALT = np.uint64(0x6C6C6D74_7379736D)


def preparing(settings: ChatSettings, template: Template, tokenizer: LoadedTokenizer) -> Prepare:
    """Return what prepares the records of a source.

    Its function raises UnfitPair, ControlString, or another ValueError for a bad record.
    """
    read = reader(settings.format, dict(settings.fields))
    check = content_check(tokenizer) if settings.special_tokens_in_text != "keep" else None

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
        spans = tuple(_spans(*each, first, settings) for each in zip(rendered, sides, strict=True))
        if isinstance(found, PreferencePair):
            _check_sides(rendered, spans)
        return Prepared(
            record=record,
            texts=tuple(each.text for each in rendered),
            spans=spans,
            hash=_hash(found),
            turns=sum(len(side.messages) for side in sides),
        )

    return prepare


def _check_sides(rendered: Sequence[Rendered], spans: Sequence[tuple[Span, ...]]) -> None:
    """A template may trim what made two sides differ, and show a prompt otherwise where other messages follow it."""
    if rendered[0].text == rendered[1].text:
        raise UnfitPair("identical_sides", "the template makes the same text of chosen and rejected")
    prompts = {each.text[: of_text[0][0]] for each, of_text in zip(rendered, spans, strict=True) if of_text}
    if len(prompts) > 1:
        raise UnfitPair("differing_prompts", "the template writes another prompt before chosen than before rejected")


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
        return tuple(_all_but(rendered, side))
    turns = [turn for turn in rendered.turns if turn.message >= first]
    turns = turns[-1:] if settings.train_on == "last" else turns
    return tuple((turn.start, turn.stop) for turn in turns if not side.is_trained or side.is_trained[turn.message])


def _all_but(rendered: Rendered, side: Conversation) -> Iterator[Span]:
    """All of the text without the answers that their record takes out."""
    place = 0
    for turn in rendered.turns:
        if side.is_trained and not side.is_trained[turn.message]:
            yield place, turn.start
            place = turn.stop
    yield place, len(rendered.text)


def _plain(side: Conversation, tokenizer: LoadedTokenizer) -> Rendered:
    """A prompt and its completion as they stand, between BOS, where the tokenizer begins with it, and EOS."""
    begin = _token(tokenizer, tokenizer.bos_id) if tokenizer.adds_bos else ""
    prompt, completion = (message["content"] for message in side.messages)
    end = _token(tokenizer, tokenizer.eos_id)
    answer = completion if end and completion.endswith(end) else completion + end
    text = (prompt if begin and prompt.startswith(begin) else begin + prompt) + answer
    return Rendered(text, (Turn(1, len(text) - len(answer), len(text)),))


def _token(tokenizer: LoadedTokenizer, token_id: int | None) -> str:
    return "" if token_id is None else str(tokenizer.backend.id_to_token(token_id))


def _hash(found: Conversation | PreferencePair) -> int:
    messages = found.messages if isinstance(found, Conversation) else found.prompt
    try:
        return hash_text(orjson.dumps(messages, default=str, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS))
    except TypeError:  # of what is nested some 250 deep
        raise ValueError("a message is nested too deep") from None
