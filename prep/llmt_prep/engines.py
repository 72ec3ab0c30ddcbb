"""What turns text into token ids: `tokenizers`, which is the reference, or `fastokens`, fifty times as fast.

An engine takes a list of texts and gives their ids end to end; it adds no BOS or EOS. Both treat the strings of control
tokens alike: as plain text, unless told to keep them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmt_prep.cutting import find_cuts
from llmt_prep.tokenizer import BACKEND_FILE, LoadedTokenizer
from llmt_shared.errors import LlmtError

PIECE_CHARACTERS = 1 << 20
"""A text of more than two such pieces is tokenized piece by piece where that changes no id: `tokenizers` needs some 120
bytes of memory for each byte of a text."""

LONGEST_WHOLE = 1 << 24
"""Characters of the longest text, or piece, that is tokenized where its tokenizer shows no place to cut: about 2 GB of
memory. A longer one is an error of the text, with either engine."""


class Encoded(NamedTuple):
    """Token ids of several texts, one after another."""

    ids: NDArray[np.uint32]
    """[T]"""
    lengths: NDArray[np.int64]
    """[texts]; ids of each."""


Encode = Callable[[Sequence[str]], Encoded]


@dataclass(frozen=True)
class Engine:
    """A way from texts to ids."""

    name: str
    """With its version, such as `tokenizers 0.23.3`."""
    encode: Encode
    """Raises whatever its library raises, for the whole list."""


def require_library_error(error: BaseException) -> None:
    """Raise what is no failure of a tokenizer's library, which raises bare Exception, or a panic of Rust."""
    is_panic = type(error).__name__ == "PanicException"  # derives from BaseException, and cannot be imported
    if isinstance(error, (LlmtError, MemoryError)) or not (isinstance(error, Exception) or is_panic):
        raise error


class EngineRefusal(Exception):  # noqa: N818  a refusal is an answer, not an error
    """Why an engine cannot serve a tokenizer."""


def reference_engine(tokenizer: LoadedTokenizer, *, keep_control: bool) -> Engine:
    """Return the engine that is right by definition.

    Args:
        tokenizer: its backend's ``encode_special_tokens`` is set.
        keep_control: the strings of special tokens become these tokens.
    """
    backend = tokenizer.backend
    backend.encode_special_tokens = not keep_control
    return Engine(f"tokenizers {version('tokenizers')}", _in_pieces(partial(_reference_encode, backend), tokenizer))


def fast_engine(tokenizer: LoadedTokenizer, *, keep_control: bool) -> Engine:
    """Return `fastokens` for a tokenizer.

    It has no switch that leaves special tokens in text alone, so it is loaded without them.

    Raises:
        EngineRefusal: it is not installed, or does not support this tokenizer.
    """
    try:
        from fastokens._native import Tokenizer as FastTokenizer
    except ImportError:
        raise EngineRefusal("fastokens is not installed (`pip install fastokens`)") from None
    content = json.loads(tokenizer.files[BACKEND_FILE])
    content |= {"post_processor": None, "truncation": None, "padding": None}
    if not keep_control:
        content["added_tokens"] = [each for each in content.get("added_tokens") or [] if not each.get("special")]
    if (content.get("model") or {}).get("dropout"):
        content["model"]["dropout"] = None  # as in the reference: one text, one result
    try:
        backend = FastTokenizer.from_json_str(json.dumps(content))
    except BaseException as error:
        require_library_error(error)
        raise EngineRefusal(f"fastokens does not support this tokenizer: {error}") from None
    return Engine(f"fastokens {version('fastokens')}", _in_pieces(partial(_fast_encode, backend), tokenizer))


def _reference_encode(backend: Tokenizer, texts: Sequence[str]) -> Encoded:
    each = [np.fromiter(e.ids, np.uint32, len(e)) for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return Encoded(np.concatenate([np.empty(0, np.uint32), *each]), np.array([len(ids) for ids in each], np.int64))


def _fast_encode(backend: Any, texts: Sequence[str]) -> Encoded:
    ids, borders = backend.encode_batch_flat(texts)
    return Encoded(np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(borders, "<i8")))


def _in_pieces(encode: Encode, tokenizer: LoadedTokenizer) -> Encode:
    """The same engine, given a long text in pieces, one at a time, where the tokenizer can be seen to allow it."""

    def encode_long(text: str) -> Encoded:
        borders = [0, *find_cuts(text, PIECE_CHARACTERS, tokenizer.backend), len(text)]
        if max(end - begin for begin, end in pairwise(borders)) > LONGEST_WHOLE:
            raise ValueError(
                f"its {len(text)} characters would take too much memory at once, and this tokenizer shows no place at "
                f"which they could be cut; wanted at most {LONGEST_WHOLE}"
            )
        parts = [encode([text[begin:end]]) for begin, end in pairwise(borders)]
        ids = np.concatenate([part.ids for part in parts])
        return Encoded(ids, np.array([len(ids)], np.int64))

    def encode_all(texts: Sequence[str]) -> Encoded:
        if all(len(text) <= 2 * PIECE_CHARACTERS for text in texts):
            return encode(texts)
        parts = [encode_long(text) if len(text) > 2 * PIECE_CHARACTERS else encode([text]) for text in texts]
        return Encoded(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    return encode_all
