"""How numbers and tables are shown in a terminal. Text from data is escaped before it gets here."""

import os
import re
from collections.abc import Sequence
from typing import TextIO

from pydantic import BaseModel

from llmt_shared.terminal import STEERING

GREENS = (32, 92)
"""Two shades that take turns."""
DIM = 2
REVERSE = 7

_BARS = " ▁▂▃▄▅▆▇█"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned text table: the first column to the left, the others to the right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    rule = "  ".join("─" * width for width in widths)
    return "\n".join([lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:])])


def histogram(counts: Sequence[int]) -> str:
    """Return one bar for each count, the largest full; a count above 0 is never shown as nothing."""
    top = max(counts, default=0)
    return "".join(_BARS[0 if not each else max(1, round(each / top * (len(_BARS) - 1)))] for each in counts)


def count(value: int) -> str:
    """Return a whole number with its thousands set apart."""
    return f"{value:,}".replace(",", " ")


def percent(value: float) -> str:
    """Return a share as a percentage; nothing that is below 1 reads 100.00 %."""
    return f"{min(value * 100, 99.99) if value < 1 else value * 100:.2f} %"


def size(num_bytes: float) -> str:
    """Return bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def as_json(value: BaseModel) -> str:
    """Return one JSON object; what could steer a terminal is escaped, as JSON allows."""
    return re.sub(f"[{STEERING}]", lambda match: f"\\u{ord(match[0]):04x}", value.model_dump_json(indent=1))


def wants_colour(stream: TextIO) -> bool:
    """Whether output to a stream is coloured: NO_COLOR says no, else FORCE_COLOR yes, else terminals are.

    Source: no-color.org and force-color.org; a variable that is empty says nothing.
    """
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def styled(text: str, *codes: int) -> str:
    """Return text in ANSI styles, each line by itself, so that a pager shows every line right."""
    begin = f"\x1b[{';'.join(map(str, codes))}m"
    return "\n".join(f"{begin}{line}\x1b[0m" if line else "" for line in text.split("\n"))
