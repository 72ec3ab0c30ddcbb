"""What a process holds of its tokenizer: loaded once, whoever asks first."""

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from llmt_prep.engines import Engine, fast_engine
from llmt_prep.tokenizer import LoadedTokenizer, load_tokenizer

if TYPE_CHECKING:
    from llmt_prep.chat.prepare import ChatSettings
    from llmt_prep.chat.tokenization import ChatTools


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


@lru_cache(maxsize=8)
def held_chat_tools(shelved: Shelved, settings: "ChatSettings") -> "ChatTools":
    """Return what a tokenizer and settings make of chats."""
    from llmt_prep.chat.forgery import id_check  # text needs no templates
    from llmt_prep.chat.offsets import encoding_with_extents
    from llmt_prep.chat.prepare import preparing
    from llmt_prep.chat.template import load_template
    from llmt_prep.chat.tokenization import ChatTools

    tokenizer = held_tokenizer(shelved)
    template = replace(load_template(settings.template, tokenizer), name="of the dataset")
    if settings.tools_template is not None:
        for_tools = replace(load_template(settings.tools_template, tokenizer), name="of the dataset for tools")
        template = replace(template, for_tools=for_tools)
    check_ids = id_check(tokenizer) if settings.special_tokens_in_text != "keep" else None
    return ChatTools(preparing(settings, template, tokenizer), encoding_with_extents(tokenizer), check_ids)
