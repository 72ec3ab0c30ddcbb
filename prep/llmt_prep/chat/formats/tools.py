"""Tools and calls of them, in the shape that templates want: arguments are an object, never its JSON in a string."""

from collections.abc import Mapping
from typing import Any

import orjson

from llmt_prep.chat.formats.fields import found


def tools(value: object, place: str) -> tuple[Mapping[str, Any], ...]:
    """Return descriptions of tools as they are; ``value`` is a list, that list as JSON, or nothing: null or "".

    Raises:
        ValueError: something else, or a list that holds something else than objects.
    """
    described = _listed(value, place)
    if wrong := [each for each in described if not isinstance(each, dict)]:
        raise ValueError(f"{place} holds {found(wrong[0])}; wanted objects that describe tools")
    return tuple(described)


def tool_calls(value: object, place: str) -> list[Mapping[str, Any]]:
    """Return a message's calls, each {"function": {"name", "arguments"}} with what else it has.

    A bare {"name", "arguments"} is put under "function"; arguments that are JSON in a string are read.

    Args:
        value: a list of calls, or JSON of such a list or of one call.
        place: what the value is called in the record.

    Raises:
        ValueError: no call, a call without a name, or arguments that are no object.
    """
    calls = _listed(value, place)
    if not calls:
        raise ValueError(f"{place} is {found(value)}; wanted a tool call")
    return [_call(call) for call in calls]


def _call(call: object) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call is {found(call)} without a function's name; wanted name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _loaded(arguments, "the arguments of a tool call")
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of a tool call: found {found(arguments)}; wanted an object")
    around = call if isinstance(call, dict) and "function" in call else {"type": "function"}
    return {**around, "function": {**function, "arguments": arguments}}


def _listed(value: object, place: str) -> list[Any]:
    if value is None or value == "":
        return []
    loaded = _loaded(value, place) if isinstance(value, str) else value
    if isinstance(value, str) and isinstance(loaded, dict):
        return [loaded]
    if not isinstance(loaded, list):
        raise ValueError(f"{place} is {found(value)}; wanted a list of objects")
    return loaded


def _loaded(text: str, place: str) -> Any:
    """JSON in a string, read as the records themselves are: no NaN, no lone surrogate, bounded depth."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{place}: found {found(text)}, which is not valid JSON: {error.msg}") from None
