"""What filters, operators and methods of templates are about to make, looked at before they make it.

Variables have a bounded size; what multiplies them is refused here where the result would have none.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from string import Formatter
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext

from llmt_prep.chat.limits import LimitError, Meter

CALL_STEPS = 20
"""Steps of a call, beside those of what it does."""

_UNKNOWN_METHODS = ("expandtabs", "maketrans", "to_bytes", "translate")
_SIZED = (str, bytes, list, tuple, dict, range)
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4})")
_WIDE_FIELD = re.compile(r"\d{4}|\{")
_TOO_WIDE = "it formats with a width that is given elsewhere or has more than three digits"


def metered_filter(meter: Meter, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that spends steps for what it looks at, and characters for what it makes."""
    check = _FILTER_CHECKS.get(name)
    place = int(hasattr(function, "jinja_pass_arg"))  # of the value, behind a context or environment

    @wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        value = whole(args[place])
        meter.spend(CALL_STEPS + _steps_through(value))
        if check is not None:
            check(meter, value, [*args[place + 1 :], *kwargs.values()])
        result = function(*args[:place], value, *args[place + 1 :], **kwargs)
        if isinstance(result, str):
            meter.spend(0, len(result))
        return result

    return metered


def whole(value: Any) -> Any:
    """Return a list for what is made while it is read, whose size nobody knows; else the value itself."""
    if isinstance(value, _SIZED) or not isinstance(value, Iterator) or isinstance(value, LoopContext):
        return value
    return list(value)


def check_operands(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Look at what ``left * right``, ``left ** right`` or ``left % right`` is to do."""
    if operator == "%" and isinstance(left, (str, bytes)):
        _check_format(meter, left, [right])
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(value, (str, bytes, list, tuple)):
                meter.require_size(len(value) * times)
        _require_few_bits(_bits(left) + _bits(right))
    elif operator == "**" and isinstance(right, int):
        _require_few_bits(_bits(left) * abs(right))


def check_method(meter: Meter, owner: Any, name: str, args: Sequence[Any]) -> None:
    """Look at what a method of a string, number or container is to do."""
    meter.spend(CALL_STEPS + _steps_through(owner))
    if name in _UNKNOWN_METHODS:
        raise SecurityError(f"the method {name!r} is not offered to chat templates")
    if name == "replace":
        _check_replace(meter, owner, args)
    elif name == "join":
        _check_join(meter, args[0] if args else (), [owner])
    else:
        _check_numbers(meter, owner, args)


def checked_format(meter: Meter, pattern: str, formatting: Callable[..., str]) -> Callable[..., str]:
    """Return ``pattern.format``, but for fields that are thousands of characters wide or too many for their values."""
    fields = [spec for _, name, spec, _ in Formatter().parse(pattern) if name is not None]
    if any(_WIDE_FIELD.search(spec or "") for spec in fields):
        raise LimitError(_TOO_WIDE)

    def checked(*args: Any, **kwargs: Any) -> str:
        meter.require_size(len(fields) * meter.weigh((args, kwargs)))
        return formatting(*args, **kwargs)

    return checked


def require_narrow(pattern: Any) -> None:
    """Raise LimitError where a pattern with `%` has a field that is thousands of characters wide."""
    if _WIDE_PERCENT.search(str(pattern)):
        raise LimitError(_TOO_WIDE)


def _steps_through(value: Any) -> int:
    """What it takes to look at all of a value once."""
    if isinstance(value, (str, bytes)):
        return len(value) >> 6
    return len(value) if isinstance(value, _SIZED) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _require_few_bits(bits: int) -> None:
    if bits > 4096:
        raise LimitError(f"it makes a number of {bits} bits")


def _check_numbers(meter: Meter, value: Any, args: Sequence[Any]) -> None:
    for number in args:
        if isinstance(number, int):
            meter.require_size(number)


def _check_replace(meter: Meter, value: Any, args: Sequence[Any]) -> None:
    if len(args) >= 2:
        text, old, new = (str(each) for each in (value, *args[:2]))
        meter.require_size(len(text) + text.count(old) * len(new))


def _check_join(meter: Meter, value: Any, args: Sequence[Any]) -> None:
    weight = meter.weigh(value)
    if args and isinstance(args[0], (str, bytes)):
        meter.require_size(weight + len(args[0]) * len(value))


def _check_indent(meter: Meter, value: Any, args: Sequence[Any]) -> None:
    width = max((len(arg) if isinstance(arg, str) else int(arg) for arg in args), default=4)
    meter.require_size(width * (1 + str(value).count("\n")))


def _check_format(meter: Meter, value: Any, args: Sequence[Any]) -> None:
    require_narrow(value)
    meter.require_size(str(value).count("%") * meter.weigh(list(args)))


_FILTER_CHECKS: dict[str, Callable[[Meter, Any, Sequence[Any]], None]] = {
    "batch": _check_numbers,
    "center": _check_numbers,
    "format": _check_format,
    "indent": _check_indent,
    "join": _check_join,
    "replace": _check_replace,
    "round": _check_numbers,
    "slice": _check_numbers,
}
