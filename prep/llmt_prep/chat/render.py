"""A conversation to one text, and which of its characters the model is to write.

What the model writes comes from the template's own generation marks. A template without them is asked for what it
would show the model before each turn, and with it: where both are literal beginnings of the whole text, the turn lies
between them; where they are not, the template rewrites the past, and nothing can be told.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llmt_prep.chat.messages import Conversation, Message, strings_in
from llmt_prep.chat.sandbox import Compiled, render_text
from llmt_prep.chat.template import Template

MAX_PREFIX_MESSAGES = 1_000_000
"""Messages rendered in all for one conversation where a template has no marks: a work that grows with the square."""

_REASONING = ("reasoning_content", "thinking", "reasoning")


class Turn(NamedTuple):
    """What the model writes for one message, with the token that ends its turn."""

    message: int
    """Index in the conversation's messages."""
    start: int
    stop: int
    """In characters of the text."""


class Rendered(NamedTuple):
    """A conversation as the model sees it."""

    text: str
    turns: tuple[Turn, ...]
    """One for each message of the assistant, in order."""


def render(template: Template, conversation: Conversation) -> Rendered:
    """Render a conversation once, and say what the model writes in it.

    Whitespace that a template puts behind the control token that ends a turn is no part of the turn.

    Raises:
        ValueError: the template refuses the conversation, exceeds a limit, or does not let it be told what the model
            writes; one line.
    """
    view = _view(template, conversation)
    assistants = [index for index, message in enumerate(view.messages) if message.get("role") == "assistant"]
    text, spans = view.text(len(view.messages))
    if view.compiled.marks is not None:
        if len(spans) != len(assistants):
            raise ValueError(
                f"chat template {view.template.name}: it has {len(spans)} generation blocks for {len(assistants)} "
                f"messages of the assistant; wanted one around what the model writes in each of them, and no others"
            )
        return Rendered(text, tuple(Turn(i, *span) for i, span in zip(assistants, spans, strict=True)))
    return Rendered(text, tuple(_turns_by_prefixes(view, text, assistants)))


def text_of(template: Template, conversation: Conversation, *, asks: bool = False) -> str:
    """Render a conversation without asking what the model writes in it; with ``asks``, for a model that is to go on.

    Raises:
        ValueError: the template refuses the conversation or exceeds a limit.
    """
    view = _view(template, conversation)
    return view.text(len(view.messages), asks=asks)[0]


class _View(NamedTuple):
    """A conversation, as templates want it, and the template that renders parts of it."""

    template: Template
    compiled: Compiled
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    size: int
    """Characters of all strings."""

    def text(self, num_messages: int, *, asks: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of the first messages and its marked spans; with ``asks``, for a model that is to go on."""
        variables = {
            **self.template.special_tokens,
            "messages": self.messages[:num_messages],
            "tools": self.tools,
            "documents": None,
            "add_generation_prompt": asks,
        }
        try:
            text = render_text(self.compiled, variables, self.size)
        except ValueError as error:
            raise ValueError(f"chat template {self.template.name}: {error}") from None
        return (text, []) if self.compiled.marks is None else _unmarked(text, *self.compiled.marks)


def _view(template: Template, conversation: Conversation) -> _View:
    if template.for_tools is not None and conversation.tools:
        template = template.for_tools
    messages = [_as_templates_want(message) for message in conversation.messages]
    strings = "\0".join(_all_strings(messages, conversation.tools))
    return _View(template, template.compiled(strings), messages, list(conversation.tools) or None, len(strings))


def _as_templates_want(message: Message) -> dict[str, Any]:
    """As transformers passes messages on: without what is null, and with reasoning under each of its names."""
    if len(message) == 2 and isinstance(message, dict) and message.get("content") is not None:
        return message  # a role and a content, as most
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _all_strings(messages: list[dict[str, Any]], tools: Sequence[Any]) -> list[str]:
    """The strings of a conversation, keys too; most messages have no others at their top."""
    found: list[str] = []
    for message in messages:
        found += message
        for value in message.values():
            if type(value) is str:
                found.append(value)
            else:
                found += strings_in(value)
    return [*found, *strings_in(tools)]


def _unmarked(text: str, begin: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without its marks, and the spans that they held; none where they are not in pairs."""
    first, *rest = text.split(begin)
    pieces, spans, place = [first], [], len(first)
    for each in rest:
        inside, *outside = each.split(end)
        if len(outside) != 1:
            return text.replace(begin, "").replace(end, ""), []
        spans.append((place, place + len(inside)))
        place += len(inside) + len(outside[0])
        pieces += (inside, outside[0])
    return "".join(pieces), spans


def _turns_by_prefixes(view: _View, text: str, assistants: Sequence[int]) -> Iterator[Turn]:
    if sum(2 * index + 1 for index in assistants) > MAX_PREFIX_MESSAGES:
        raise ValueError(
            f"chat template {view.template.name}: it marks no turns, and {len(assistants)} turns are too many to find "
            f"them without; use a template with generation marks"
        )
    done = 0
    for index in assistants:
        start = _prefix_length(view, text, index, index, asks=True)
        stop = _behind_control_token(view, text, start, _prefix_length(view, text, index, index + 1))
        if not done <= start < stop:
            raise ValueError(f"chat template {view.template.name}: it writes nothing for turn {index + 1} (assistant)")
        yield Turn(index, start, stop)
        done = stop


def _prefix_length(view: _View, text: str, index: int, num_messages: int, *, asks: bool = False) -> int:
    """Length of the text of the first messages, which must be the beginning of the whole text."""
    if num_messages == len(view.messages):
        return len(text)
    prefix, _ = view.text(num_messages, asks=asks)
    if text.startswith(prefix):
        return len(prefix)
    pairs = enumerate(zip(prefix, text, strict=False))
    place = next((place for place, (one, other) in pairs if one != other), min(len(prefix), len(text)))
    before, whole = (each[max(0, place - 20) : place + 30] for each in (prefix, text))
    raise ValueError(
        f"chat template {view.template.name}: what the model writes in turn {index + 1} (assistant) cannot be told: "
        f"{'before' if asks else 'after'} it the text is {before!r}, in the whole conversation it is {whole!r}"
    )


def _behind_control_token(view: _View, text: str, start: int, stop: int) -> int:
    stripped = text[start:stop].rstrip()
    return start + len(stripped) if stripped.endswith(view.template.control_tokens) else stop
