"""The formats by name: which of them records have, and the function that reads them."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from llmt_prep.chat.formats import chats, pairs
from llmt_prep.chat.formats.fields import Names, Record, field, found
from llmt_prep.chat.formats.turns import TURN_FIELDS
from llmt_prep.chat.messages import Conversation, PreferencePair
from llmt_shared.errors import ConfigError

Kind = Literal["sft", "preference"]


class Format(NamedTuple):
    """How a source's records look."""

    kind: Kind
    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    """Fields, of which `fields:` may rename any."""
    fits: Callable[[Record, Names], bool]
    """Whether a record looks like one of this format, however broken it may be inside."""
    read_with: Callable[[Names], Callable[[Record], Conversation | PreferencePair]]


def detect(records: Sequence[Mapping[str, Any]], kind: Kind, fields: Names) -> str:
    """Return the name of the format that the first records of a source have.

    Records that fit no format are left to be quarantined, as long as there are others, and these agree.

    Args:
        records: the first few of the source.
        kind: formats of the other kind are not considered.
        fields: a format's name of a field -> the records' own.

    Raises:
        ConfigError: no format fits, or several; no format of this kind has such a field. The message does not know
            which source it is.
    """
    candidates = {name: each for name, each in FORMATS.items() if each.kind == kind}
    _check_fields(
        fields,
        {name for each in candidates.values() for name in each.needs + each.may_have},
        f"a format of kind {kind}",
    )
    fitting = [
        {name for name, each in candidates.items() if each.fits(record, fields)}
        for record in records
        if isinstance(record, dict)
    ]
    names = sorted(set().union(*fitting))
    if len(names) == 1:
        return names[0]
    if names:
        raise ConfigError(f"records look like {' and '.join(names)}; say which with `format: {names[0]}`")
    if not records:
        raise ConfigError("no records that could tell its format; mend `path:`, or say `format:`")
    seen = _shape(records[0])
    known = ", ".join(f"{name} ({', '.join(each.needs)})" for name, each in candidates.items())
    raise ConfigError(
        f"found {seen}, which is no known format of {kind} data; known are {known}; say where the fields lie "
        f"with `fields:`, such as `fields: {{{_example(kind)}}}`"
    )


def reader(name: str, fields: Names) -> Callable[[Any], Conversation | PreferencePair]:
    """Return the function that reads a format's records.

    It raises ValueError with a reason of one line for a record that cannot be read, and UnfitPair for a pair that is
    of no use. Contents are neither stripped nor changed. Messages may be the record's own objects: do not change them.

    Args:
        name: one of `FORMATS`.
        fields: a format's name of a field -> the records' own; one of the record itself may be a path, such as
            `instances.0.output`.

    Raises:
        ConfigError: no such format; a field that it does not have.
    """
    if name not in FORMATS:
        raise ConfigError(f"format {name!r} is not known{_nearest(name, FORMATS)}; known are {', '.join(FORMATS)}")
    chosen = FORMATS[name]
    _check_fields(fields, {*chosen.needs, *chosen.may_have}, f"format {name}")
    read = chosen.read_with(fields)

    def read_record(record: Any) -> Conversation | PreferencePair:
        if not isinstance(record, dict):
            raise ValueError(f"the record is {found(record)}; wanted an object")
        try:
            return read(record)
        except RecursionError:  # of comparing two sides
            raise ValueError("the record is nested too deep") from None

    return read_record


def _check_fields(fields: Names, known: set[str], of_what: str) -> None:
    for name in fields:
        if name not in known:
            nearest = _nearest(name, known)
            raise ConfigError(f"fields: {of_what} has no {name!r}{nearest}; it has {', '.join(sorted(known))}")


def _nearest(word: str, known: Mapping[str, Any] | set[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _example(kind: Kind) -> str:
    return "messages: dialog, role: speaker" if kind == "sft" else "prompt: question, chosen: answer"


def _shape(record: object) -> str:
    """Fields of a record and what they hold, one level deep; names are data, so they are quoted and cut."""
    if not isinstance(record, dict):
        return found(record)
    fields = [f"{found(name)} ({_kind(value)})" for name, value in list(record.items())[:12]]
    return f"a record with {', '.join(fields) or 'no fields'}{', ...' if len(record) > 12 else ''}"


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"list of objects with {', '.join(map(found, list(value[0])[:6])) or 'no fields'}"
    return {list: "list", dict: "object", bool: "boolean", int: "number", float: "number"}.get(type(value), "null")


def _fits_turns(list_name: str, role_name: str) -> Callable[[Record, Names], bool]:
    def fits(record: Record, names: Names) -> bool:
        turns = field(names, list_name)(record)
        first = turns[0] if isinstance(turns, list) and turns else None
        return isinstance(first, dict) and names.get(role_name, role_name) in first

    return fits


def _fits_types(*wanted: tuple[str, type | tuple[type, ...]]) -> Callable[[Record, Names], bool]:
    def fits(record: Record, names: Names) -> bool:
        return all(isinstance(field(names, name)(record), types) for name, types in wanted)

    return fits


def _fits_transcript(record: Record, names: Names) -> bool:
    return all(pairs.is_transcript(field(names, name)(record)) for name in ("chosen", "rejected"))


_TEXT_OR_LIST = (str, list)
_NOTHING = type(None)

_BESIDE = ("system", "tools", *TURN_FIELDS)

FORMATS: Mapping[str, Format] = {
    "messages": Format(
        "sft", ("messages", "role", "content"), _BESIDE, _fits_turns("messages", "role"), chats.messages_format
    ),
    "sharegpt": Format(
        "sft", ("conversations", "from", "value"), ("system", "tools", "train", "weight"),
        _fits_turns("conversations", "from"), chats.sharegpt_format,
    ),
    "alpaca": Format(
        "sft", ("instruction", "output"), ("input", "system", "history"),
        _fits_types(("instruction", str), ("output", str)), chats.alpaca_format,
    ),
    "prompt_completion": Format(
        "sft", ("prompt", "completion"), _BESIDE,
        _fits_types(("prompt", _TEXT_OR_LIST), ("completion", _TEXT_OR_LIST)), chats.prompt_completion_format,
    ),
    "explicit": Format(
        "preference", ("prompt", "chosen", "rejected"), _BESIDE,
        _fits_types(("prompt", _TEXT_OR_LIST), ("chosen", _TEXT_OR_LIST), ("rejected", _TEXT_OR_LIST)),
        pairs.explicit_format,
    ),
    "implicit": Format(
        "preference", ("chosen", "rejected"), _BESIDE,
        _fits_types(("prompt", _NOTHING), ("chosen", list), ("rejected", list)), pairs.implicit_format,
    ),
    "transcript": Format("preference", ("chosen", "rejected"), (), _fits_transcript, pairs.transcript_format),
}  # fmt: skip
"""Each format by the name that `format:` takes."""
