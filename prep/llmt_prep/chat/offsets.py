"""Which part of a text each token stands for: told by the tokens' own bytes where a tokenizer spells texts out.

A byte-level tokenizer without a normalizer gives back every byte of a text, so that lengths of tokens, added up, are
places in the text. That needs no offsets from the engine, which the fast one does not have, and makes tokenizing
several times as fast. It is checked for every text; where it does not hold, `tokenizers` is asked for its offsets.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmt_prep.encoding import encode
from llmt_prep.engines import LONGEST_WHOLE, Encoded, Engine, reference_engine, require_library_error
from llmt_prep.tokenizer import BACKEND_FILE, LoadedTokenizer


class Extents(NamedTuple):
    """Where tokens begin and end, in texts laid end to end: T tokens."""

    begin: NDArray[np.int64]
    """[T]; ascending."""
    end: NDArray[np.int64]
    """[T]; ascending."""
    text: NDArray[np.int64]
    """[texts + 1]; where each text begins, then where the last ends."""
    is_bytes: bool
    """Whether places count UTF-8 bytes, or characters."""


def spelling_of(tokenizer: LoadedTokenizer) -> NDArray[np.int64] | None:
    """Return how many bytes of a text each token stands for: [ids]; ``None`` where tokens do not spell texts out."""
    content = json.loads(tokenizer.files[BACKEND_FILE])
    if content.get("normalizer") is not None or not _is_byte_level(content):
        return None
    sizes = np.zeros(tokenizer.max_id + 1, np.int64)
    for token, token_id in tokenizer.backend.get_vocab(with_added_tokens=False).items():
        sizes[token_id] = len(token)  # a character of the vocabulary is a byte of the text
    for token_id, added in tokenizer.backend.get_added_tokens_decoder().items():
        sizes[token_id] = len(added.content.encode())
    return sizes


def spelled_extents(texts: Sequence[str], encoded: Encoded, spelling: NDArray[np.int64]) -> Extents | None:
    """Return the extents of tokens by their own lengths; ``None`` where these are not those of the texts."""
    end = np.cumsum(spelling[encoded.ids])
    text = np.cumsum([0, *(len(each) if each.isascii() else len(each.encode()) for each in texts)], dtype=np.int64)
    spelled = np.append(0, end)[np.cumsum(encoded.lengths)]
    return Extents(end - spelling[encoded.ids], end, text, True) if np.array_equal(spelled, text[1:]) else None


class Encoding(NamedTuple):
    """Ids of texts with their extents."""

    encoded: Encoded
    extents: Extents
    reasons: dict[int, str]
    """Why a text has no ids, by its number."""
    engine: str
    """What made the ids."""


EncodeWithExtents = Callable[[Sequence[str], Engine | None, Counter[str]], Encoding]
"""(texts, fast engine, counts) -> ids and extents; ``counts["fallbacks"]`` as in `encoding.encode`."""


def encoding_with_extents(tokenizer: LoadedTokenizer) -> EncodeWithExtents:
    """Return what encodes texts, in which the strings of control tokens become these tokens."""
    spelling, reference = spelling_of(tokenizer), reference_engine(tokenizer, keep_control=True)
    with_offsets = _with_offsets(tokenizer)

    def encode_texts(texts: Sequence[str], fast: Engine | None, counts: Counter[str]) -> Encoding:
        if spelling is not None:
            found = encode(texts, fast, reference, counts)
            whole = ["" if number in found.reasons else text for number, text in enumerate(texts)]
            if (extents := spelled_extents(whole, found.encoded, spelling)) is not None:
                return Encoding(found.encoded, extents, found.reasons, found.engine)
        return _by_offsets(texts, with_offsets, reference.name)

    return encode_texts


def _with_offsets(tokenizer: LoadedTokenizer) -> Tokenizer:
    """A copy of the reference that leaves a token's spaces in its offsets."""
    content = json.loads(tokenizer.files[BACKEND_FILE])
    content |= {"post_processor": None, "truncation": None, "padding": None}
    if (content.get("model") or {}).get("dropout"):
        content["model"]["dropout"] = None
    backend = Tokenizer.from_str(json.dumps(content))
    backend.encode_special_tokens = False
    return backend


def _by_offsets(texts: Sequence[str], backend: Tokenizer, engine: str) -> Encoding:
    ids, offsets, lengths, reasons = [], [], [], {}
    for number, text in enumerate(texts):
        try:
            found, extent = _one_by_offsets(text, backend)
        except BaseException as error:
            require_library_error(error)
            reasons[number] = f"the tokenizer cannot encode this text: {error}"
            found, extent = np.empty(0, np.uint32), np.empty((0, 2), np.int64)
        ids.append(found)
        offsets.append(extent)
        lengths.append(len(found))
    border = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    joined = np.concatenate([np.empty((0, 2), np.int64), *offsets]) + np.repeat(border[:-1], lengths)[:, None]
    encoded = Encoded(np.concatenate([np.empty(0, np.uint32), *ids]), np.array(lengths, np.int64))
    return Encoding(encoded, Extents(joined[:, 0], joined[:, 1], border, False), reasons, engine)


def _one_by_offsets(text: str, backend: Tokenizer) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Ids of a text, [T], and where each token begins and ends in its characters, [T, 2]."""
    if len(text) > LONGEST_WHOLE:
        raise ValueError(f"its {len(text)} characters would take too much memory; wanted at most {LONGEST_WHOLE}")
    found = backend.encode(text, add_special_tokens=False)
    offsets = np.fromiter(chain.from_iterable(found.offsets), np.int64, 2 * len(found)).reshape(-1, 2)
    if (np.diff(offsets, axis=0) < 0).any():
        raise ValueError("its tokens' offsets do not ascend, so that no target can be told")
    return np.fromiter(found.ids, np.uint32, len(found)), offsets


def places_in(text: str, characters: Sequence[int], is_bytes: bool) -> list[int]:
    """Return places in a text, which ascend, in the unit of its extents."""
    if not is_bytes or text.isascii():
        return list(characters)
    pieces = (len(text[begin:end].encode()) for begin, end in pairwise([0, *characters]))
    return list(accumulate(pieces))


def _is_byte_level(content: dict[str, object]) -> bool:
    """Whether every character of a token is a byte, and texts are cut without anything added or left out."""
    first = content.get("pre_tokenizer")
    assert first is None or isinstance(first, dict)
    steps = (first or {}).get("pretokenizers", [first] if first else [])
    kinds = [step["type"] for step in steps]
    adds = any(step.get("add_prefix_space") for step in steps)
    removes = any(step.get("behavior") == "Removed" for step in steps)
    model = content.get("model")
    is_bpe = isinstance(model, dict) and model.get("type") == "BPE" and not model.get("byte_fallback")
    known = set(kinds) <= {"ByteLevel", "Split", "Digits", "Punctuation"}
    return is_bpe and known and "ByteLevel" in kinds and not adds and not removes
