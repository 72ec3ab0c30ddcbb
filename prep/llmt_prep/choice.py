"""Which engine tokenizes a run: the fast one where it can be had, is trusted and agrees on the hard cases."""

from typing import Literal, NamedTuple

from llmt_prep.edge_texts import edge_texts
from llmt_prep.encoding import encode_each
from llmt_prep.engines import Engine, EngineRefusal, reference_engine
from llmt_prep.guard import first_difference
from llmt_prep.held import Shelved, held_fast_engine, held_tokenizer
from llmt_shared.errors import ConfigError

Wanted = Literal["auto", "tokenizers", "fastokens"]


class Choice(NamedTuple):
    """The engine of a run."""

    is_fast: bool
    reason: str
    """Why it is the reference; empty for the fast engine."""


def choose_engine(wanted: Wanted, shelved: Shelved, *, keep_control: bool, inexact: frozenset[str]) -> Choice:
    """Choose, and try the fast engine on the edge cases before it touches a document.

    Args:
        wanted: `auto` takes the reference where the fast engine cannot serve.
        shelved: the tokenizer to be served.
        keep_control: the strings of special tokens become these tokens.
        inexact: engines that were found to be wrong for this tokenizer.

    Raises:
        ConfigError: the fast engine is asked for and cannot serve.
    """
    if wanted == "tokenizers":
        return Choice(False, "asked for")
    try:
        fast = held_fast_engine(shelved, keep_control)
        reference = reference_engine(held_tokenizer(shelved), keep_control=keep_control)
        _require_exact(fast, reference, held_tokenizer(shelved).control_tokens, inexact)
    except EngineRefusal as refusal:
        if wanted == "fastokens":
            raise ConfigError(f"engine: fastokens: {refusal}; use `engine: auto` or `engine: tokenizers`") from None
        return Choice(False, str(refusal))
    return Choice(True, "")


def _require_exact(fast: Engine, reference: Engine, control_tokens: tuple[str, ...], inexact: frozenset[str]) -> None:
    if fast.name in inexact:
        raise EngineRefusal(f"{fast.name} was found to give other tokens for this tokenizer than {reference.name}")
    encoded = encode_each(edge_texts(control_tokens), fast)  # what it refuses, it refuses aloud
    texts, ids = list(encoded), list(encoded.values())
    if difference := first_difference(texts, ids, reference.encode):
        number, how = difference
        raise EngineRefusal(f"{fast.name} gives other tokens than {reference.name} for {texts[number][:40]!r}: {how}")
