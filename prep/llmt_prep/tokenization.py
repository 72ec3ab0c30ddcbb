"""A unit of input becomes a unit of the token store: read, tokenized, checked and counted in one pass."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmt_prep import documents
from llmt_prep.documents import PREVIEW_BYTES, BadRecord, Document, End, Item, Reading, Unit, compression, shown
from llmt_prep.store import UnitMeta, UnitWriter, hash_text, token_dtype, writing_unit
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_shared.errors import ConfigError, DataError

TOKENIZATION_VERSION = 2
"""Raised when the same input and settings give another unit, and only then: every stored unit is made again."""

BATCH_BYTES = 1 << 20
"""Text given to the tokenizer at once; a document as large as this goes alone."""


@dataclass(frozen=True)
class TextSettings:
    """What surrounds a document's text, and what strings of control tokens inside it become."""

    special_tokens_in_text: Literal["as_text", "error", "keep"] = "as_text"
    """Plain text, an error, or the control token."""
    bos: Literal["auto", "always", "never"] = "auto"
    """`auto` does as the tokenizer does."""
    eos: Literal["always", "never"] = "always"


def tokenize_unit(
    unit: Unit,
    reading: Reading,
    tokenizer: LoadedTokenizer,
    settings: TextSettings,
    directory: Path,
    check: Callable[[], None] = lambda: None,
    origin: Mapping[str, Any] | None = None,
) -> UnitMeta:
    """Write one unit of the token store.

    Args:
        unit: what to read.
        reading: how to read it.
        tokenizer: its backend's `encode_special_tokens` is set to what the settings ask for.
        settings: BOS, EOS and control strings.
        directory: the folder to make; it appears whole or not at all.
        check: called when all is read; what it raises keeps the unit from appearing.
        origin: what the unit is made of, to be kept with it.

    Raises:
        ConfigError: BOS or EOS is wanted and the tokenizer has none.
        DataError: the input is damaged, or holds a control string where that is an error.
    """
    bos_id, eos_id = _surrounding_ids(tokenizer, settings)
    tokenizer.backend.encode_special_tokens = settings.special_tokens_in_text != "keep"
    surround = partial(_surround, bos_id=bos_id, eos_id=eos_id)
    forbidden = _forbidden_ids(tokenizer, settings)
    find = control_string_finder(tokenizer.control_tokens)
    dtype = token_dtype(tokenizer.max_id)
    counts: Counter[str] = Counter()
    with writing_unit(directory, dtype, origin) as writer:
        for batch in _batches(documents.read(unit, reading)):
            marked = [item for item in batch if isinstance(item, Document) and find(item.text) is not None]
            if marked and settings.special_tokens_in_text == "error":
                raise DataError(_control_string_message(unit, marked[0], find(marked[0].text)))
            counts["documents_with_control_strings"] += len(marked)
            _write(writer, counts, _tokenize(tokenizer.backend, batch, forbidden, surround))
        check()
        return writer.finish({name: counts[name] for name in _COUNTED})


def unit_facts(
    unit: Unit, content_hash: str, reading: Reading, tokenizer: LoadedTokenizer, settings: TextSettings
) -> dict[str, Any]:
    """Return whatever could change the content of a unit, as JSON can hold it.

    Args:
        unit: its path counts only for how the file is compressed.
        content_hash: what `hash_content` says of it.
        reading: how to read it.
        tokenizer: counts by its files and its BOS and EOS.
        settings: BOS, EOS and control strings.
    """
    return {
        "version": TOKENIZATION_VERSION,
        "content": content_hash,
        "range": [unit.start, unit.stop],
        "compression": compression(unit.path),
        "reading": {**asdict(reading), "reader": unit.reader},
        "tokenizer": [tokenizer.digest, tokenizer.bos_id, tokenizer.eos_id],
        "settings": asdict(settings),
    }


def unit_key(facts: Mapping[str, Any]) -> str:
    """Return the name of a unit in the token store: 64 hex digits that change with any of its facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def hash_content(unit: Unit, feed: Callable[[bytes], None] = lambda piece: None) -> str:
    """Return the xxh3_128 of every stored byte on which the unit's records depend; ``feed`` is given them too."""
    state = xxhash.xxh3_128()
    for piece in documents.unit_bytes(unit):
        state.update(piece)
        feed(piece)
    return str(state.hexdigest())


def control_string_finder(control_tokens: Sequence[str]) -> Callable[[str], str | None]:
    """Return a function that gives the first control string in a text, or ``None``.

    Tokenizers have hundreds of them and few texts hold any, so a text is first searched for their first two
    characters, of which there are few kinds.
    """
    strings = sorted(filter(None, control_tokens), key=len, reverse=True)  # a longer one wins over its own start
    starts = sorted({string[:2] for string in strings})
    pattern = re.compile("|".join(map(re.escape, strings)))

    def find(text: str) -> str | None:
        if not any(start in text for start in starts):
            return None
        match = pattern.search(text)
        return match[0] if match else None

    return find


_COUNTED = [field.name for field in fields(UnitMeta) if field.type is int]


def _surrounding_ids(tokenizer: LoadedTokenizer, settings: TextSettings) -> tuple[int | None, int | None]:
    """BOS and EOS where they are wanted."""
    wants_bos = settings.bos == "always" or (settings.bos == "auto" and tokenizer.adds_bos)
    wants_eos = settings.eos == "always"
    for wanted, token_id, role in ((wants_bos, tokenizer.bos_id, "bos"), (wants_eos, tokenizer.eos_id, "eos")):
        if wanted and token_id is None:
            special = ", ".join(tokenizer.control_tokens[:12]) or "none"
            raise ConfigError(
                f"{role}: always, but the tokenizer names no {role.upper()} token that is in its vocabulary; "
                f"give `{role}_token` (its special tokens: {special}), or set `{role}: never`"
            )
    return tokenizer.bos_id if wants_bos else None, tokenizer.eos_id if wants_eos else None


def _forbidden_ids(tokenizer: LoadedTokenizer, settings: TextSettings) -> NDArray[np.bool_]:
    """[max_id + 1] ids that a text must not become: with `keep`, none."""
    forbidden = np.zeros(tokenizer.max_id + 1, np.bool_)
    if settings.special_tokens_in_text != "keep":
        forbidden[sorted(tokenizer.control_ids)] = True
    return forbidden


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Group items of about BATCH_BYTES of text; what comes out of a unit does not depend on the grouping."""
    batch: list[Item] = []
    size = 0
    for item in items:
        item_size = len(item.text) if isinstance(item, Document) else PREVIEW_BYTES
        if batch and size + item_size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item_size
    yield batch


class _Tokenized(NamedTuple):
    record: int
    text: bytes
    ids: NDArray[np.uint32]


def _tokenize(
    backend: Tokenizer,
    batch: list[Item],
    forbidden: NDArray[np.bool_],
    surround: Callable[[NDArray[np.uint32]], NDArray[np.uint32]],
) -> list[_Tokenized | BadRecord | End]:
    """The batch with every document tokenized, or a bad record if it cannot be."""
    texts = [item.text for item in batch if isinstance(item, Document)]
    encoded = iter(_encode(backend, texts, forbidden))
    done: list[_Tokenized | BadRecord | End] = []
    for item in batch:
        if not isinstance(item, Document):
            done.append(item)
        elif isinstance(ids := next(encoded), str):
            done.append(BadRecord(item.record, ids, shown(item.text)))
        else:  # an empty text stays without tokens, even where the tokenizer begins every text with some
            done.append(_Tokenized(item.record, item.text.encode(), surround(ids) if item.text else ids[:0]))
    return done


def _encode(backend: Tokenizer, texts: list[str], forbidden: NDArray[np.bool_]) -> list[NDArray[np.uint32] | str]:
    """Token ids of each text, or why it cannot be had."""
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception, and for the whole batch
        if len(texts) == 1:
            return [f"the tokenizer cannot encode this text: {error}"]
        return [result for text in texts for result in _encode(backend, [text], forbidden)]
    return [_checked(np.fromiter(encoding.ids, np.uint32), forbidden, backend) for encoding in encodings]


def _checked(ids: NDArray[np.uint32], forbidden: NDArray[np.bool_], backend: Tokenizer) -> NDArray[np.uint32] | str:
    """The ids, or why not: the text becomes a control token all the same."""
    hits = np.flatnonzero(forbidden[ids])
    if not hits.size:
        return ids
    token_id = int(ids[hits[0]])
    token = backend.id_to_token(token_id)
    return (
        f"the text becomes the control token {token!r} (id {token_id}), which the vocabulary has as a plain token too"
    )


def _surround(ids: NDArray[np.uint32], bos_id: int | None, eos_id: int | None) -> NDArray[np.uint32]:
    """The ids with BOS before and EOS behind, where they are wanted and not there already."""
    if bos_id is not None and ids[:1].tolist() != [bos_id]:
        ids = np.concatenate([np.array([bos_id], np.uint32), ids])
    if eos_id is not None and ids[-1:].tolist() != [eos_id]:
        ids = np.concatenate([ids, np.array([eos_id], np.uint32)])
    return ids


def _write(writer: UnitWriter, counts: Counter[str], done: list[_Tokenized | BadRecord | End]) -> None:
    tokenized = [item for item in done if isinstance(item, _Tokenized)]
    stored = [item for item in tokenized if len(item.ids)]
    bad = [item for item in done if isinstance(item, BadRecord)]
    for record in bad:
        writer.quarantine(record)
    ids = [item.ids for item in stored]
    writer.add(
        np.concatenate([np.empty(0, np.uint32), *ids]),
        np.array([len(each) for each in ids], np.int64),
        [item.record for item in stored],
        [hash_text(item.text) for item in stored],
    )
    counts.update(
        records=len(tokenized) + len(bad),
        documents=len(stored),
        empty=len(tokenized) - len(stored),
        quarantined=len(bad),
        tokens=sum(len(item.ids) for item in stored),
        text_bytes=sum(len(item.text) for item in stored),
        lines=sum(item.lines for item in done if isinstance(item, End)),
    )


def _control_string_message(unit: Unit, document: Document, string: str | None) -> str:
    line = documents.lines_before(unit) + document.record + 1
    return (
        f"{unit.path}:{line}: the text holds the control string {string!r}, and `special_tokens_in_text` is `error`; "
        f"clean the text, or set it to `as_text` (it stays plain text) or `keep` (it becomes the control token)"
    )
