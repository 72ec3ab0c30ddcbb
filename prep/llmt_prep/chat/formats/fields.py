"""Fields of a record: where they lie when a config renames them, and how a reason shows what was found in one."""

from collections.abc import Callable, Mapping
from typing import Any

Names = Mapping[str, str]
"""A format's name of a field -> the records' own; fields that it leaves out are called what the format calls them."""

Record = Mapping[str, Any]


def field(names: Names, name: str) -> Callable[[Record], Any]:
    """Return a function that gives a record's field, or ``None`` where it is missing or null.

    A name may be a path, such as `instances.0.output`: keys and list indices, where no key has the whole name.
    """
    key = names.get(name, name)
    if "." not in key:
        return lambda record: record.get(key)
    return lambda record: record[key] if key in record else _walk(record, key.split("."))


def found(value: object) -> str:
    """Say in a few words, on one line, what a value is, whatever its size and depth."""
    if isinstance(value, str):
        return f"{value[:40]!r}..." if len(value) > 40 else repr(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return f"the number {value!r:.40}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _walk(value: Any, path: list[str]) -> Any:
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value
