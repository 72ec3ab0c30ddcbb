"""What a worker does with one unit: the engine that the run chose, the guard's verdict, the next unit read ahead."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmt_prep.cache import Origin
from llmt_prep.documents import Reading, Unit, check_unchanged
from llmt_prep.fetching import at_hand
from llmt_prep.guard import EngineDiffers, distrust
from llmt_prep.held import Shelved, held_chat_tools, held_fast_engine, held_tokenizer
from llmt_prep.inputs import InputFile
from llmt_prep.store import UnitMeta
from llmt_prep.tokenization import TextSettings, tokenize_unit

if TYPE_CHECKING:
    from llmt_prep.chat.prepare import ChatSettings

_AHEAD_BYTES = 128 << 10
"""Of one call Linux serves no more than the device's read-ahead window, and drops the rest without a word."""
_MOST_AHEAD = 64 << 20
"""Of a file that cannot be cut, only the start: the rest would be gone from memory again before its turn."""


@dataclass(frozen=True)
class TokenizeTask:
    """One unit to tokenize; picklable and small."""

    unit: Unit
    reading: Reading
    settings: "TextSettings | ChatSettings"
    tokenizer: Shelved
    is_fast: bool
    """Tokenized by the fast engine, guarded by the reference."""
    begins_source: bool
    """Whether the guard looks at its first documents, too."""
    directory: str
    file: InputFile
    """Where the unit lies, as it was when it was hashed."""
    origin: Origin
    ahead: tuple[str, int, int] | None
    """Path and byte range of what the same worker is likely to be given next, where it lies on a disk."""


def run_task(task: TokenizeTask) -> UnitMeta:
    """Tokenize one unit; in any process.

    A unit's name says what its file held when it was hashed: of a file that has changed since, none may appear.
    """
    _read_ahead(task.ahead)
    try:
        with at_hand(task.unit, task.origin.facts["content"], task.file) as unit:
            return _tokenizing(task)(
                unit,
                task.reading,
                directory=Path(task.directory),
                check=partial(check_unchanged, (task.file,)),
                origin=asdict(task.origin),
                fast=held_fast_engine(task.tokenizer, keeps_control(task.settings)) if task.is_fast else None,
                begins_source=task.begins_source,
            )
    except EngineDiffers as difference:
        distrust(Path(task.tokenizer.folder), difference.engine)
        raise


def keeps_control(settings: "TextSettings | ChatSettings") -> bool:
    """Whether the engine makes control tokens of their strings: in chats it must, for templates write them."""
    return not isinstance(settings, TextSettings) or settings.special_tokens_in_text == "keep"


def _tokenizing(task: TokenizeTask) -> Callable[..., UnitMeta]:
    tokenizer, settings = held_tokenizer(task.tokenizer), task.settings
    if isinstance(settings, TextSettings):
        return partial(tokenize_unit, tokenizer=tokenizer, settings=settings)
    from llmt_prep.chat.tokenization import tokenize_chats  # text needs no templates

    tools = held_chat_tools(task.tokenizer, settings)
    return partial(tokenize_chats, tokenizer=tokenizer, settings=settings, tools=tools)


def _read_ahead(ahead: tuple[str, int, int] | None) -> None:
    """Ask the system to read a byte range while other work goes on; what it cannot do is left undone."""
    if ahead is None or not hasattr(os, "posix_fadvise"):
        return
    path, start, stop = ahead
    with suppress(OSError), open(path, "rb") as file:
        for offset in range(start, min(stop, start + _MOST_AHEAD), _AHEAD_BYTES):
            os.posix_fadvise(file.fileno(), offset, min(_AHEAD_BYTES, stop - offset), os.POSIX_FADV_WILLNEED)
