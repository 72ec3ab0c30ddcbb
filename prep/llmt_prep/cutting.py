"""Where a long text may be cut so that its pieces have the same tokens as the whole.

A tokenizer cuts a text into words before its model sees them, and a word's tokens depend on that word alone. So a cut
between two words is safe; which places are such is asked of the tokenizer itself, on the text around each place.
"""

import re
from collections.abc import Iterator

from tokenizers import Tokenizer

_PLACE = re.compile(r"(?<=[^\W_])(?= [^\W_])|(?<=[^\W_])(?=[,.;:!?\u3001\u3002\uff01\uff0c\uff1f])")
"""After a letter or digit, and before a space and another one, or before a mark (\\u3001.. are those of Chinese and
Japanese): for most tokenizers a border of words."""

_AROUND = 256
"""Characters on either side that are looked at."""

_TRIES = 64
"""Places tried for one cut before the text stays whole to its end."""


def find_cuts(text: str, wanted: int, backend: Tokenizer) -> list[int]:
    """Return ascending places, about ``wanted`` characters apart; none where the tokenizer gives no safe one.

    Args:
        text: to be cut.
        wanted: characters of a piece; a piece may be longer where no safe place follows.
        backend: the tokenizer.
    """
    if backend.pre_tokenizer is None:  # the whole text is one word
        return []
    cuts: list[int] = []
    while (start := (cuts[-1] if cuts else 0) + wanted) < len(text):
        place = next((place for place in _places(text, start) if _is_safe(text, place, backend)), None)
        if place is None:
            break
        cuts.append(place)
    return cuts


def _places(text: str, start: int) -> Iterator[int]:
    for number, match in enumerate(_PLACE.finditer(text, start)):
        if number == _TRIES:
            return
        yield match.start()


def _is_safe(text: str, place: int, backend: Tokenizer) -> bool:
    """Whether the words and the ids around a place are those of its two sides.

    The words show that no word crosses the place, the ids that no added token does: those are found before words are.
    """
    left, right = text[max(0, place - _AROUND) : place], text[place : place + _AROUND]
    if _words(left + right, backend) != _words(left, backend) + _words(right, backend):
        return False
    whole, *sides = backend.encode_batch_fast([left + right, left, right], add_special_tokens=False)
    return bool(whole.ids == sides[0].ids + sides[1].ids)


def _words(text: str, backend: Tokenizer) -> list[str]:
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
