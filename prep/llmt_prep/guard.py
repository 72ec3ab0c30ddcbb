"""Whether the fast engine gives what the reference gives: asked of hard cases, of first documents and of a sample.

Measured before it was built: of four fast tokenizers, three differed silently somewhere (FACTS of the project), so no
engine is believed. A difference stops the run, and what the engine made for this tokenizer is not used again.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmt_prep.encoding import encode_what_can_be, ids_of_texts
from llmt_prep.engines import Encode, Encoded, Engine
from llmt_shared import durable
from llmt_shared.errors import DataError
from llmt_shared.order import mix

FIRST_BYTES = 1 << 17
"""Of each unit that begins a source, documents within this many bytes are compared."""

SAMPLED_SHARE = 1 / 2048
"""Of all documents; which ones, is a function of their texts alone. The reference is some fifty times slower."""

LONGEST = 1 << 16
"""Characters: of a longer document its beginning is compared."""


class EngineDiffers(DataError):  # noqa: N818  as DataError's other kinds, it is told to the user
    """A fast engine gave other tokens than the reference; `engine` is its name."""

    def __init__(self, message: str, engine: str) -> None:
        super().__init__(message, engine)
        self.engine = engine

    def __str__(self) -> str:
        return str(self.args[0])


Ids = NDArray[np.uint32]

_SAMPLE_SALT = np.uint64(0x6C6C6D74_67756172)
_INEXACT = "inexact.json"


def sampled(text_hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which documents the guard looks at: [documents]."""
    return mix(text_hashes ^ _SAMPLE_SALT) < np.uint64(SAMPLED_SHARE * 2**64)


def first_difference(texts: Sequence[str], found: Sequence[Ids], reference: Encode) -> tuple[int, str] | None:
    """Compare ids with the reference, text by text.

    Returns:
        The number of the first text on which they differ, and how; ``None`` where they agree on all.
    """
    if not texts:
        return None
    wanted = encode_what_can_be(texts, Engine("reference", reference))
    for number, (mine, right) in enumerate(zip(found, ids_of_texts(wanted.encoded), strict=True)):
        if number in wanted.reasons:
            return number, f"it has {len(mine)} tokens, but the reference refuses it: {wanted.reasons[number]}"
        if not np.array_equal(mine, right):
            shorter = min(len(mine), len(right))
            token = int(np.argmax(np.append(mine[:shorter] != right[:shorter], True)))
            return number, f"token {token} is {_shown(mine, token)}, wanted {_shown(right, token)}"
    return None


def chosen_ids(
    texts: Sequence[str], encoded: Encoded, chosen: Sequence[int], engine: Encode
) -> tuple[list[str], list[Ids]]:
    """Return what is to be compared of the chosen texts, and its ids: a text, or the beginning of a long one.

    Args:
        texts: of a batch.
        encoded: their ids.
        chosen: numbers of texts.
        engine: encodes the beginnings.
    """
    stored = ids_of_texts(encoded) if chosen else []
    short, ids = [], []
    for number in chosen:
        if len(texts[number]) <= LONGEST:
            short.append(texts[number])
            ids.append(stored[number])
        else:
            short.append(texts[number][:LONGEST])
            ids.append(engine(short[-1:]).ids)
    return short, ids


def distrust(tokenizer_folder: Path, engine: str) -> None:
    """Remember that an engine was wrong for the tokenizer in a folder of the cache."""
    names = sorted(inexact_engines(tokenizer_folder) | {engine})
    durable.write(tokenizer_folder / _INEXACT, json.dumps(names) + "\n")


def inexact_engines(tokenizer_folder: Path) -> frozenset[str]:
    """Names of the engines that were found wrong for the tokenizer in a folder of the cache."""
    try:
        return frozenset(json.loads((tokenizer_folder / _INEXACT).read_text()))
    except FileNotFoundError:
        return frozenset()


def _shown(ids: Ids, token: int) -> str:
    return str(ids[token]) if token < len(ids) else "none"
