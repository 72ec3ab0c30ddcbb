"""Texts of a batch to ids: encoded, with what fails left out, and with BOS and EOS.

Everything works on the whole batch at once: with a fast engine, a step in Python for each document would cost as much
as tokenizing does.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep.engines import Encoded, Engine, require_library_error


class Result(NamedTuple):
    """What an engine made of a batch."""

    encoded: Encoded
    reasons: dict[int, str]
    """Why a text has no ids, by its number; its length is 0."""
    engine: str
    """Which engine made it."""


def encode(texts: Sequence[str], fast: Engine | None, reference: Engine, counts: Counter[str]) -> Result:
    """Encode with the fast engine, where it fails with the reference, and where that fails text by text.

    ``counts["fallbacks"]`` counts the batches that the fast engine failed on.
    """
    if fast is not None:
        try:
            return Result(fast.encode(texts), {}, fast.name)
        except BaseException as error:
            require_library_error(error)
            counts["fallbacks"] += 1
    result = encode_what_can_be(texts, reference)
    reasons = {number: f"the tokenizer cannot encode this text: {reason}" for number, reason in result.reasons.items()}
    return result._replace(reasons=reasons)


def encode_what_can_be(texts: Sequence[str], engine: Engine) -> Result:
    """Encode with one engine; the reasons are its own words."""
    try:
        return Result(engine.encode(texts), {}, engine.name)
    except BaseException as error:
        require_library_error(error)
        return _one_by_one(texts, engine)


def encode_each(texts: Sequence[str], engine: Engine) -> dict[str, NDArray[np.uint32]]:
    """Return the ids of the texts that an engine can encode."""
    result = encode_what_can_be(texts, engine)
    pairs = zip(texts, ids_of_texts(result.encoded), strict=True)
    return {text: ids for number, (text, ids) in enumerate(pairs) if number not in result.reasons}


def ids_of_texts(encoded: Encoded) -> list[NDArray[np.uint32]]:
    """Return the ids of each text by themselves."""
    ends = np.cumsum(encoded.lengths)
    return [encoded.ids[end - length : end] for end, length in zip(ends, encoded.lengths, strict=True)]


def only(encoded: Encoded, is_wanted: NDArray[np.bool_]) -> Encoded:
    """Return the ids of some texts; the others get a length of 0.

    Args:
        encoded: ids of all texts.
        is_wanted: [texts].
    """
    if not encoded.lengths[~is_wanted].any():
        return encoded
    return Encoded(encoded.ids[np.repeat(is_wanted, encoded.lengths)], np.where(is_wanted, encoded.lengths, 0))


def surrounded(encoded: Encoded, bos_id: int | None, eos_id: int | None) -> Encoded:
    """Return every text that has ids with BOS before and EOS behind, where they are wanted and not there already."""
    ids, lengths = encoded
    is_text = lengths > 0
    ends = np.cumsum(lengths)[is_text]
    starts = ends - lengths[is_text]
    lacks_bos = ids[starts] != bos_id if bos_id is not None else np.zeros(len(starts), np.bool_)
    lacks_eos = ids[ends - 1] != eos_id if eos_id is not None else np.zeros(len(ends), np.bool_)
    longer = lengths.copy()
    longer[is_text] += lacks_bos.astype(np.int64) + lacks_eos
    new_ends = np.cumsum(longer)[is_text]
    bos_places = (new_ends - longer[is_text])[lacks_bos]
    eos_places = new_ends[lacks_eos] - 1
    out = np.empty(longer.sum(), np.uint32)
    is_id = np.ones(len(out), np.bool_)
    is_id[bos_places] = is_id[eos_places] = False
    out[is_id] = ids
    out[bos_places] = bos_id or 0  # no places where there is none
    out[eos_places] = eos_id or 0
    return Encoded(out, longer)


def text_of_place(encoded: Encoded, places: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the numbers of the texts in whose ids the places lie."""
    return np.searchsorted(np.cumsum(encoded.lengths), places, side="right")


def _one_by_one(texts: Sequence[str], engine: Engine) -> Result:
    """A library that cannot encode one text raises for the whole batch."""
    encoded, reasons = [], {}
    for number, text in enumerate(texts):
        try:
            encoded.append(engine.encode([text]))
        except BaseException as error:
            require_library_error(error)
            reasons[number] = str(error)
            encoded.append(Encoded(np.empty(0, np.uint32), np.zeros(1, np.int64)))
    return Result(Encoded(*(np.concatenate(column) for column in zip(*encoded, strict=True))), reasons, engine.name)
