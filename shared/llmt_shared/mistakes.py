"""What is wrong with a config, as its user is told: one line per mistake, with the file's line and the way out."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails
from ruamel.yaml.comments import CommentedBase, CommentedMap

CONFLICT = "conflict"
"""Type of the mistakes that lie between keys; their context holds the ``text``, and how many keys it names itself."""

Location = tuple[int | str, ...]
Place = tuple[Location, str]
"""Keys of the file down to a mistake; and its text where it is a conflict, for those stand alone."""


def describe(
    path: Path,
    document: CommentedMap,
    model: type[BaseModel],
    errors: Iterable[ErrorDetails],
    overridden: Iterable[Location],
) -> list[str]:
    """Return one line per mistake, in the order of the file; those of the command line come first.

    Args:
        path: of the file.
        document: what it holds, with what the command line changed.
        model: what it should say.
        errors: what pydantic found.
        overridden: keys that the command line gave.
    """
    overridden = list(overridden)
    places = _by_place(errors, document, model)
    mistakes = [_describe(path, document, model, place, found, overridden) for place, found in places.items()]
    return list(dict.fromkeys(text for _, text in sorted(mistakes, key=lambda mistake: mistake[0])))


def _by_place(
    errors: Iterable[ErrorDetails], document: CommentedMap, model: type[BaseModel]
) -> dict[Place, list[ErrorDetails]]:
    """Mistakes by where they are in the file: several at one place are what the members of a union wanted there."""
    places: dict[Place, list[ErrorDetails]] = {}
    for error in errors:
        location = tuple(_in_document(document, error["loc"], may_be_missing=error["type"] == "missing"))
        text = str(error["ctx"]["text"]) if error["type"] == CONFLICT else ""
        places.setdefault((location, text), []).append(error)
    hidden = _misspelt(places, model) | _of_other_members(places)
    return {place: found for place, found in places.items() if place not in hidden}


def _misspelt(places: Mapping[Place, list[ErrorDetails]], model: type[BaseModel]) -> set[Place]:
    """Keys that are missing because another one, which is told, was meant to be them."""
    unknown = [location for (location, _), found in places.items() if found[0]["type"] == "extra_forbidden"]
    meant = {(*above, _near(str(key), _fields(model, tuple(above)))) for *above, key in unknown}
    return {place for place, found in places.items() if found[0]["type"] == "missing" and place[0] in meant}


def _of_other_members(places: Iterable[Place]) -> set[Place]:
    """What one member of a union wanted of a value in which another member found something wrong further inside."""
    values = {location for location, text in places if not text}
    above = {location[:depth] for location in values for depth in range(len(location))}
    return {(location, "") for location in values & above}


def _describe(
    path: Path,
    document: CommentedMap,
    model: type[BaseModel],
    place: Place,
    mistakes: list[ErrorDetails],
    overridden: list[Location],
) -> tuple[int, str]:
    """Line (0 on the command line) and message of the mistakes at one place."""
    location = place[0]
    on_command_line = any(location[: len(key)] == key for key in overridden)
    line = 0 if on_command_line else _line(document, location)
    where = "command line" if on_command_line else f"{path}:{line}"
    if mistakes[0]["type"] == CONFLICT:  # its text names the key itself
        location = location[: len(location) - mistakes[0]["ctx"]["depth"]]
    key = ".".join(str(part) for part in location)
    return line, ": ".join(filter(None, [where, key, _message(model, location, mistakes)]))


def _message(model: type[BaseModel], location: Location, mistakes: list[ErrorDetails]) -> str:
    first, ctx = mistakes[0], mistakes[0].get("ctx", {})
    if first["type"] == "extra_forbidden":
        return _unknown(model, location)
    if first["type"] == "missing":
        return "missing; it is required"
    if first["type"] in ("value_error", CONFLICT):
        return str(ctx["error"] if first["type"] == "value_error" else ctx["text"])
    choices = [choice for mistake in mistakes for choice in _choices(mistake)]
    found = ctx.get("tag", first["input"])
    near = f", did you mean {near!r}?" if (near := _near(str(found), choices)) else ""
    if len(mistakes) == 1 and choices:
        return f"{found!r} is not one of {', '.join(choices)}{near}"
    wanted = dict.fromkeys(", ".join(_choices(mistake)) or _wanted(mistake, model, location) for mistake in mistakes)
    return f"found {short(found)}; wanted {' or '.join(wanted)}{near}"


def _choices(mistake: ErrorDetails) -> list[str]:
    """Values that would have been right, where they can be listed."""
    if mistake["type"] not in ("literal_error", "union_tag_invalid"):
        return []
    ctx = mistake.get("ctx", {})
    return re.findall(r"'([^']*)'", str(ctx.get("expected") or ctx.get("expected_tags") or mistake["msg"]))


_WANTED = {
    "path_type": "path",
    "finite_number": "a finite number",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "keys and values",
    "model": "keys and values",
}
"""By pydantic's kinds of mistakes, or the words that they begin with."""


def _wanted(mistake: ErrorDetails, model: type[BaseModel], location: Location) -> str:
    kind, message = mistake["type"], mistake["msg"]
    if limit := re.search(r"at (?:least|most) \d+ (?:item|character)s?", message):
        return limit[0]
    known = _WANTED.get(kind) or _WANTED.get(kind.partition("_")[0])
    if known:
        return f"text, or {known}" if known == "keys and values" and _takes_text(model, location) else known
    wanted = message.removeprefix("Input should be ").removeprefix("a ")
    return f"a number {wanted}" if kind.startswith(("greater_", "less_")) else wanted


def _unknown(model: type[BaseModel], location: Location) -> str:
    *above, key = location
    owners = [each for each in _models_at(model, tuple(above)) if key in each.model_fields]
    if owners:  # of another member of the union than the one that is meant
        return f"belongs to {' and '.join(_tags(owners))}; remove `{key}`, or choose that"
    known = sorted(_fields(model, tuple(above)))
    near = f", did you mean {near!r}?" if (near := _near(str(key), known)) else ""
    return f"unknown key{near}; known here: {', '.join(known)}"


def _tags(models: Iterable[type[BaseModel]]) -> list[str]:
    """``key: value`` of the one field that tells each member of a union from the others."""
    tags = []
    for model in models:
        literals = [(name, get_args(field.annotation)) for name, field in model.model_fields.items()]
        tags += [
            f"`{name}: {values[0]}`" for name, values in literals if len(values) == 1 and isinstance(values[0], str)
        ]
    return sorted(tags)


def _in_document(document: Any, location: Location, *, may_be_missing: bool) -> Iterator[int | str]:
    """The parts of pydantic's location that are keys of the file: it also names union members and validators."""
    node = document
    for depth, part in enumerate(location):
        if isinstance(node, Mapping):
            if part not in node and (depth != len(location) - 1 or not may_be_missing):
                continue
            node = node.get(part)
        elif isinstance(node, Sequence) and not isinstance(node, str):
            if not isinstance(part, int):
                continue
            node = node[part] if part < len(node) else None
        else:
            return
        yield part


def _line(document: Any, location: Location) -> int:
    """Line (from 1) of the deepest part of the location that the file holds."""
    line, node = 1, document
    for part in location:
        if not isinstance(node, CommentedBase) or not isinstance(part, (int, str)):
            break
        try:
            line = (node.lc.key(part) if isinstance(node, CommentedMap) else node.lc.item(part))[0] + 1
            node = node[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            break
    return line


def _fields(model: Any, location: Location) -> set[str]:
    """Names of the keys that the model takes at a location, over all members of unions."""
    return {name for each in _models_at(model, location) for name in each.model_fields}


def _models_at(model: Any, location: Location) -> set[type[BaseModel]]:
    """The model at a location, or all members of a union."""
    models = _models(model)
    for part in location:
        inner: set[type[BaseModel]] = set()
        for each in models:
            if isinstance(part, str) and part in each.model_fields:
                inner |= _models(each.model_fields[part].annotation)
        models = inner or models
    return models


def _takes_text(model: type[BaseModel], location: Location) -> bool:
    """Whether a key takes text too: a member of its union that pydantic did not ask."""
    *above, key = location
    fields = [each.model_fields.get(str(key)) for each in _models_at(model, tuple(above))]
    return any({str, Path} & set(_leaves(field.annotation)) for field in fields if field is not None)


def _leaves(annotation: Any) -> Iterator[Any]:
    arguments = get_args(annotation)
    yield annotation if isinstance(annotation, type) else None
    for argument in arguments:
        yield from _leaves(argument)


def _models(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {found for argument in get_args(annotation) for found in _models(argument)}


def _near(word: str, known: Iterable[str]) -> str | None:
    """The most similar of the known words, if one is similar."""
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)), None)


def short(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
