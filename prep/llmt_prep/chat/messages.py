"""What chats are once they are read: messages as templates want them, whatever format they came in."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Message = Mapping[str, Any]
"""`role` (system, developer, user, assistant or tool), `content` (a string), and what else the template may look at:
`tool_calls`, `tool_call_id`, `name`, `reasoning_content`. Contents are as they were in the record."""


class Conversation(NamedTuple):
    """Messages in order, at least one."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of the tools that the model may call, as JSON schema; beside the messages."""
    is_trained: tuple[bool, ...] = ()
    """For each message, whether its record lets it be trained on; () where the record says nothing of it. Only
    assistant messages ever are."""
    is_plain: bool = False
    """A prompt and a completion that are one text as they stand, where no template is used."""


class PreferencePair(NamedTuple):
    """Two continuations of one prompt, the first of them preferred."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    """At least one message; the first is the assistant's."""
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


class UnfitPair(ValueError):  # noqa: N818  a finding about data, which a setting may let pass
    """A pair that is well-formed and yet of no use; ``fault`` is one of `FAULTS`."""

    def __init__(self, fault: str, reason: str) -> None:
        super().__init__(reason)
        self.fault = fault


FAULTS = ("differing_prompts", "identical_sides", "empty_answer")
"""The sides do not continue the same prompt; they are the same; one of them says nothing."""


def strings_in(value: Any) -> Iterator[str]:
    """Yield all strings in a value as JSON has them, keys too, in no order; however deep it is nested."""
    stack = [value]
    while stack:
        part = stack.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping):
            yield from part
            stack.extend(part.values())
        elif isinstance(part, (list, tuple)):
            stack.extend(part)
