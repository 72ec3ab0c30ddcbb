"""Text from data, shown so that it cannot steer a terminal."""

import re

STEERING = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
"""What can steer a terminal or reorder its text: C0 (but not tab and line feed), DEL, C1, bidirectional controls; to
stand inside the brackets of a regular expression."""


def escaped(text: str) -> str:
    """Return text from data with control characters made visible, so that it cannot steer a terminal.

    A line feed is marked and kept, a tab too; C0, C1, DEL and bidirectional controls become codes.
    """
    text = text.replace("\n", "⏎\n").replace("\t", "→\t")
    return re.sub(f"[{STEERING}]", _code, text)


def _code(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
