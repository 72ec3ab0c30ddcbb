"""Texts that tokenizers are known to differ on: spaces, quotes, digits, marks, scripts, emoji, control characters."""
# ruff: noqa: RUF001, E501  that some look alike is the point

import random
from functools import lru_cache


@lru_cache(maxsize=1)
def edge_texts(control_tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Return some 1500 texts that tokenizers are known to differ on; always the same ones.

    Args:
        control_tokens: they appear whole, in parts and in company.
    """
    choose = random.Random(20240229)  # noqa: S311  no secrets here
    atoms = [*_ATOMS, *control_tokens[:24], *(token[:-1] for token in control_tokens[:8])]
    mixed = ("".join(choose.choices(atoms, k=choose.randrange(1, 24))) for _ in range(1000))
    runs = (atom * length for atom in _ATOMS for length in (2, 3, 17, 300))
    return tuple(dict.fromkeys([*atoms, *runs, *mixed, *_every_block()]))


def _every_block() -> list[str]:
    """Characters of the whole of Unicode, 64 from each stretch of 512, apart and in company of a letter."""
    choose = random.Random(1)  # noqa: S311
    stretches = [range(start, start + 512) for start in range(0, 0x20000, 512) if not 0xD800 <= start < 0xE000]
    picks = ["".join(map(chr, sorted(choose.sample(stretch, 64)))) for stretch in stretches]
    return [*picks, *(" a".join(pick) for pick in picks)]


_ATOMS = (
    " ", "  ", "\n", "\n\n", "\r", "\r\n", "\t", " \n", "\n ", "\0", "\x0b", "\x0c", "\x1b", "\x7f", "\x85", "\u00a0",
    "\u00ad", "\u200b", "\u200d", "\u2028", "\u2029", "\u202e", "\u3000", "\ufeff", "\ufffd", "\ufffe", "\U0010ffff",
    "a", "A", "z", "the", " the", "The", "word", "don't", "I'LL", "'s", "'S", "'T", "\u2019s", "ſ", "'ſ", "x's", "s'",
    "1", "12", "123", "1234", "12345", "0.5", "1,000", "½", "²", "٣", "१२३", "Ⅷ", "①", ".", ",", "...", "!?", "/*", "*/",
    "//", "--", "==", "!=", "<|", "|>", "<", ">", "</s>", "[INST]", "##", "▁", "Ġ", "Ċ", "@#$%^&*", "{}", "[](){}", "\\n",
    "_", "__init__", "snake_case", "CamelCase", "ABCdef", "é", "e\u0301", "ñ", "n\u0303", "Å", "\u212b", "ö", "ß", "ﬁ",
    "İ", "ı", "ǅ", "Σς", "Привет", "мир", "שלום", "مرحبا", "नमस्ते", "ไทย", "日本語", "中文", "한국어", "\u1112\u1161\u11ab", "ｆｕｌｌ",
    "👍", "👍🏽", "👨‍👩‍👧", "🇩🇪", "❤️", "\U0001d518", "𐍈", "\u0300", "\u0301\u0301", "https://a.b/c?d=e&f", "a@b.c",
    "0x1F", "1e-5", "    return x\n", "\tif (x)\n", "def f():\n", "<div>", "&amp;", "\\u00e9", "aGVsbG8gd29ybGQ=",
)  # fmt: skip
