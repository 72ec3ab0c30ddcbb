"""Junk as corpora have it, from a seed, and what a plain reference makes of it: a text, or nothing that can be used.

The reference shares no code with the product: Python's own `json` and strict UTF-8. It is as strict as RFC 7493
(I-JSON): no lone surrogates and no numbers beyond a double, also in fields that nobody asked for.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from random import Random

LIMIT = 4096
"""`max_record_bytes` of all that is made here."""

BOM = b"\xef\xbb\xbf"
SNIPPETS = [
    "the quick brown fox", "naïve", "日本語", "🙂", "\U0010ffff", "\ufdd0", "e\u0301", "\u2028", "\u2029", "\x85",
    "\x1c", "\0", "\x7f", "\t", "\r", "\n", "\n\n", '"', "\\", "\\ud800", "<|endoftext|>", "<|pad|>", "\ufeff",
    "\u202e", "{}", " ",
]  # fmt: skip
RAW_SNIPPETS = [
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc3",
    b"\xf4\x90\x80\x80",
    b"\xc0\x80",
    b"\0",
    BOM,
    b"\r",
    b"\x0c",
    b"\x1b[",
]
SCALARS = [5, -0.5, True, None, [], ["text"], {}, {"text": "inner"}, 10**30]

Expected = dict[int, str | None]
"""By record number: the text, or None where the record is bad; what is no record is not there."""


def text(random: Random) -> str:
    return " ".join(random.choices(SNIPPETS, k=random.randrange(1, 12)))


def good_line(random: Random) -> bytes:
    record = {"id": random.randrange(99), "text": text(random), "more": random.choice(SCALARS)}
    return json.dumps(record, ensure_ascii=random.random() < 0.5).encode()


def cut_line(random: Random) -> bytes:
    line = good_line(random)
    return line[: random.randrange(len(line))]


def flipped_line(random: Random) -> bytes:
    line = bytearray(good_line(random))
    for _ in range(random.randrange(1, 4)):
        line[random.randrange(len(line))] = random.randrange(256)
    return bytes(line).replace(b"\n", b" ")


def spliced_line(random: Random) -> bytes:
    line, place = good_line(random), random.randrange(99)
    return line[:place] + random.choice(RAW_SNIPPETS) + line[place:]


def random_line(random: Random) -> bytes:
    return random.randbytes(random.randrange(80)).replace(b"\n", b"")


def odd_line(random: Random) -> bytes:
    """A line of one known kind: wrong types, missing and repeated fields, surrogates, numbers, blanks, marks."""
    number = random.choice(
        [b"1e308", b"-0", b"1e309", b"9" * 400, b"0.1e-999", b"NaN", b"-Infinity", b"01", b"1.", b"+1"]
    )
    escape = random.choice(
        [b"\\ud800", b"\\udc00", b"\\udc00\\ud800", b"\\ud83d\\ude42", b"\\ud83dx", b"\\u0000", b"\\u12", b"\\x41"]
    )
    return random.choice([
        json.dumps(random.choice([*SCALARS, "text"])).encode(),
        json.dumps({"text": random.choice(SCALARS)}).encode(),
        json.dumps({"txt": text(random), "Text": "x", "": "y"}).encode(),
        b'{"text": 5, "text": "second"}', b'{"text": "first", "text": null}', b'{"text": ""}',
        b'{"text": "a' + escape + b'b"}', b'{"title": "' + escape + b'", "text": "c"}',
        b'{"' + escape + b'": 0, "text": "d"}',
        b'{"n": ' + number + b', "text": "e"}', b'{"text": ' + number + b"}",
        BOM + good_line(random), b"\0" + good_line(random),
        good_line(random) + random.choice([b"\r", b" \t", b",", b"\0", b"{}"]),
        b"", b" \t", b"\r", b"\x0b\x0c", b"\0\0", b"null", b"[", b'"', b"{", b"'text'", b'{"text": \'a\'}',
        b'{text: "a"}', b"\xff\xfe{\0", b'{"text": "a\tb"}', b'{"text": "a\xe2\x80\xa8b"}',
    ])  # fmt: skip


def deep_line(random: Random) -> bytes:
    depth, (opening, closing) = random.choice([50, 200, 5000]), random.choice([(b"[", b"]"), (b'{"a":', b"}")])
    closed = random.choice([depth, depth, depth - 1])
    nested = opening * depth + b"0" + closing * closed
    return random.choice([b'{"text": "deep", "more": ' + nested + b"}", nested])


def long_line(random: Random) -> bytes:
    """A record of about the largest size."""
    frame = len(b'{"text": ""}')
    return b'{"text": "' + b"x" * (LIMIT - frame + random.choice([-1, 0, 1, 900, 9000])) + b'"}'


LINES: Sequence[Callable[[Random], bytes]] = (
    good_line, cut_line, flipped_line, spliced_line, random_line, odd_line, odd_line, odd_line, deep_line, long_line
)  # fmt: skip


def json_lines(random: Random, count: int) -> list[bytes]:
    return [random.choice(LINES)(random) for _ in range(count)]


def text_lines(random: Random, count: int) -> list[bytes]:
    """Lines of plain text; a third are blank, some are no UTF-8 and some too long."""
    kinds = [
        lambda: text(random).replace("\n", " ").encode(), lambda: b"good " + random.choice(RAW_SNIPPETS),
        lambda: b"x" * (LIMIT + random.choice([-1, 0, 1])), lambda: random.choice([b"", b" ", b"\r", b"\t\r"]),
        lambda: b"", lambda: random_line(random),
    ]  # fmt: skip
    return [random.choice(kinds)() for _ in range(count)]


def cells(random: Random, count: int) -> list[bytes | None]:
    """Values of a string column: nulls, empty strings, invalid UTF-8 and too long ones among the good."""
    kinds: list[Callable[[], bytes | None]] = [
        lambda: text(random).encode(), lambda: text(random).encode(), lambda: None, lambda: b"",
        lambda: text(random).encode() + random.choice(RAW_SNIPPETS), lambda: b"x" * (LIMIT + random.choice([-1, 0, 1])),
    ]  # fmt: skip
    return [random.choice(kinds)() for _ in range(count)]


def expected_of_json_lines(raw: bytes) -> Expected:
    lines = raw.removeprefix(BOM).split(b"\n")
    return {number: _text_of(line) for number, line in enumerate(lines) if len(line) > LIMIT or line.strip()}


def expected_of_text(raw: bytes, record: str) -> Expected:
    raw = raw.removeprefix(BOM)
    if record == "file":
        return {0: decoded(raw)}
    lines = list(enumerate(raw.split(b"\n")))
    if record == "line":
        return {n: decoded(line.removesuffix(b"\r"), len(line)) for n, line in lines if line.strip()}
    return dict(_paragraphs(lines))


def decoded(raw: bytes | None, size: int | None = None) -> str | None:
    if raw is None or (len(raw) if size is None else size) > LIMIT:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _paragraphs(lines: list[tuple[int, bytes]]) -> Iterator[tuple[int, str | None]]:
    for is_blank, group in groupby(lines, key=lambda line: not line[1].strip()):
        if not is_blank:
            numbers, parts = zip(*group, strict=True)
            yield numbers[0], decoded(b"\n".join(part.removesuffix(b"\r") for part in parts), len(b"\n".join(parts)))


def _text_of(line: bytes) -> str | None:
    if len(line) > LIMIT:
        return None
    try:
        value = json.loads(
            line.decode("utf-8"),
            parse_int=_finite, parse_float=_finite, parse_constant=_refused, object_pairs_hook=_object,
        )  # fmt: skip
    except (ValueError, RecursionError):
        return None
    found = value.get("text") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    json.dumps(pairs, ensure_ascii=False).encode("utf-8")  # a surrogate raises, also in what a repeated key replaces
    return dict(pairs)


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(digits)
    return number


def _refused(name: str) -> float:
    raise ValueError(name)
