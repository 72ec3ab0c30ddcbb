"""What a process holds of its tokenizer: loaded once, whoever asks first."""

from functools import lru_cache
from typing import NamedTuple

from llmt_prep.engines import Engine, fast_engine
from llmt_prep.tokenizer import LoadedTokenizer, load_tokenizer


class Shelved(NamedTuple):
    """A tokenizer by what every worker can load it from."""

    folder: str
    eos_token: str | None
    bos_token: str | None


_tokenizers: dict[Shelved, LoadedTokenizer] = {}


def hold(shelved: Shelved, tokenizer: LoadedTokenizer) -> None:
    """Let `held_tokenizer` give this one, in this process, and no other."""
    _tokenizers.clear()
    _tokenizers[shelved] = tokenizer


def held_tokenizer(shelved: Shelved) -> LoadedTokenizer:
    """Return a tokenizer; it is loaded where this process holds another or none."""
    if shelved not in _tokenizers:
        hold(shelved, load_tokenizer(shelved.folder, None, shelved.eos_token, shelved.bos_token))
    return _tokenizers[shelved]


@lru_cache(maxsize=1)
def held_fast_engine(shelved: Shelved, keep_control: bool) -> Engine:
    """Return the fast engine for a tokenizer.

    Raises:
        EngineRefusal: it cannot serve this tokenizer.
    """
    return fast_engine(held_tokenizer(shelved), keep_control=keep_control)
