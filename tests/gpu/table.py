"""All that the suite found, as one table."""

from collections.abc import Iterator, Mapping
from typing import Any

_WIDTH = 150


def render(found: Mapping[str, Any]) -> str:
    """Return the table: a line for each part and each of its cases."""
    return "\n".join(line[:_WIDTH] for line in _lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name, part in found["parts"].items():
        seconds = part.get("seconds", 0)
        yield f"{name:<34} {part['status']:<7} {seconds:.0f} s {part.get('reason', '')}".rstrip()
        for case in part["cases"]:
            yield f"  {case['case']:<32} {case['status']:<7} {_describe(case)}".rstrip()
        for line in part.get("last lines", ()):
            yield f"    | {line}"


def _describe(case: Mapping[str, Any]) -> str:
    values = "  ".join(f"{name} {_number(value)}" for name, value in case["values"].items())
    return "  ".join(text for text in (values, case["reason"].replace("\n", " ")) if text)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
