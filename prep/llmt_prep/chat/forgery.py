"""Whether what a record says would become control tokens, which are the template's alone to write."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llmt_prep.chat.messages import Conversation, Message, strings_in
from llmt_prep.chat.render import render
from llmt_prep.chat.template import Template
from llmt_prep.control import control_id_finder, control_string_finder, control_string_lister, seam_finder
from llmt_prep.encoding import text_of_place
from llmt_prep.engines import Encoded
from llmt_prep.tokenizer import LoadedTokenizer


class ControlString(ValueError):  # noqa: N818  what a record has, for settings to judge
    """A message holds the string of a control token, or makes one with the text beside it."""


ContentCheck = Callable[[Conversation, str, Template], None]
"""(conversation, its text, the template that made it) -> ControlString where a message would forge."""

IdCheck = Callable[[Sequence[str], Encoded], dict[int, str]]
"""(texts, their ids) -> by number of the text, why its control ids are not those that its template wrote."""


def content_check(tokenizer: LoadedTokenizer) -> ContentCheck:
    """Return what looks at the messages, and at the seams between them and the template."""
    find, listed = control_string_finder(tokenizer.control_tokens), control_string_lister(tokenizer.control_tokens)
    could_join = seam_finder(tokenizer.control_tokens)

    def check(side: Conversation, text: str, template: Template) -> None:
        contents = [*_contents(side.messages), *strings_in(side.tools)]
        if (string := find(("" if side.is_plain else "\x00").join(contents))) is not None:
            raise ControlString(f"a message holds the control string {string!r}")
        if side.is_plain or not any(could_join(content.strip()) for content in contents):
            return
        messages = tuple(_set_apart(message, could_join) for message in side.messages)
        tools = tuple(_apart(tool, could_join) for tool in side.tools)
        if listed(text) != listed(render(template, side._replace(messages=messages, tools=tools)).text):
            raise ControlString("a message becomes a control token together with the template's text beside it")

    return check


def id_check(tokenizer: LoadedTokenizer) -> IdCheck:
    """Return what compares ids with strings: a tokenizer that normalizes can make control tokens of other strings."""
    listed, find_ids = control_string_lister(tokenizer.control_tokens), control_id_finder(tokenizer.control_ids)

    def check(texts: Sequence[str], encoded: Encoded) -> dict[int, str]:
        found = np.bincount(text_of_place(encoded, find_ids(encoded.ids)), minlength=len(texts))
        wanted = [len(listed(text)) for text in texts]
        return {
            number: f"its text has {strings} strings of control tokens, and its tokens {ids} control tokens"
            for number, (strings, ids) in enumerate(zip(wanted, found.tolist(), strict=True))
            if strings != ids
        }

    return check


def _set_apart(message: Message, could_join: Callable[[str], bool]) -> Message:
    return {key: value if key == "role" else _apart(value, could_join) for key, value in message.items()}


def _apart(value: Any, could_join: Callable[[str], bool]) -> Any:
    """The same, with a letter around each string that could become part of a control string."""
    if isinstance(value, str):
        return f"x{value}x" if could_join(value.strip()) else value
    if isinstance(value, Mapping):
        return {key: _apart(each, could_join) for key, each in value.items()}
    return [_apart(each, could_join) for each in value] if isinstance(value, (list, tuple)) else value


def _contents(messages: Sequence[Message]) -> Iterator[str]:
    """All strings of messages but their roles."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, str) and len(message) == 2:  # most have nothing else
            yield content
        else:
            yield from strings_in({key: value for key, value in message.items() if key != "role"})
