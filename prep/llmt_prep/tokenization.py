"""A unit of input becomes a unit of the token store: read, tokenized, checked and counted in one pass."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmt_prep import documents
from llmt_prep.control import control_id_finder, control_string_finder
from llmt_prep.documents import PREVIEW_BYTES, BadRecord, Document, End, Item, Reading, Unit, compression, shown
from llmt_prep.encoding import encode, only, surrounded, text_of_place
from llmt_prep.engines import Encoded, Engine, reference_engine
from llmt_prep.guard import FIRST_BYTES, EngineDiffers, chosen_ids, first_difference, sampled
from llmt_prep.store import COUNTED, UnitMeta, UnitWriter, hash_text, token_dtype, writing_unit
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_shared.errors import ConfigError, DataError

if TYPE_CHECKING:
    from llmt_prep.chat.prepare import ChatSettings

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
    fast: Engine | None = None,
    begins_source: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> UnitMeta:
    """Write one unit of the token store.

    Args:
        unit: what to read.
        reading: how to read it.
        tokenizer: its backend is the reference; `encode_special_tokens` is set to what the settings ask for.
        settings: BOS, EOS and control strings.
        directory: the folder to make; it appears whole or not at all.
        check: called when all is read; what it raises keeps the unit from appearing.
        fast: an engine to be used in place of the reference, which then only guards it.
        begins_source: the guard compares the first documents too, not only its sample.
        origin: what the unit is made of, to be kept with it.

    Raises:
        ConfigError: BOS or EOS is wanted and the tokenizer has none.
        DataError: the input is damaged, or holds a control string where that is an error.
        EngineDiffers: the fast engine does not give what the reference gives.
    """
    bos_id, eos_id = surrounding_ids(tokenizer, settings)
    is_kept = settings.special_tokens_in_text == "keep"
    reference = reference_engine(tokenizer, keep_control=is_kept)
    find_strings = control_string_finder(tokenizer.control_tokens)
    find_ids = control_id_finder(() if is_kept else tokenizer.control_ids)
    counts: Counter[str] = Counter()
    with writing_unit(directory, token_dtype(tokenizer.max_id), origin) as writer:
        for batch in _batches(documents.read(unit, reading)):
            marked = [number for number, text in enumerate(batch.texts) if find_strings(text) is not None]
            if marked and settings.special_tokens_in_text == "error":
                text = batch.texts[marked[0]]
                raise DataError(_control_string_message(unit, batch.records[marked[0]], find_strings(text)))
            counts["documents_with_control_strings"] += len(marked)
            encoded, reasons, engine = encode(batch.texts, fast, reference, counts)
            if fast is not None and engine == fast.name:
                texts = Texts(batch.texts, batch.records, batch.hashes, batch.sizes)
                compare_engines(unit, texts, encoded, (fast, reference), counts, begins_source)
            for number, token_id in _control_ids(encoded, find_ids):  # the last of a text names it
                reasons[number] = _becomes_control(token_id, tokenizer)
            is_text = np.array([bool(text) and i not in reasons for i, text in enumerate(batch.texts)], np.bool_)
            _write(writer, counts, batch, surrounded(only(encoded, is_text), bos_id, eos_id), reasons)
        check()
        return writer.finish({name: counts[name] for name in COUNTED}, (fast or reference).name)


def unit_facts(
    unit: Unit,
    content_hash: str,
    reading: Reading,
    tokenizer: LoadedTokenizer,
    settings: "TextSettings | ChatSettings",
) -> dict[str, Any]:
    """Return whatever could change the content of a unit, as JSON can hold it.

    Args:
        unit: its path counts only for how the file is compressed.
        content_hash: what `hash_content` says of it.
        reading: how to read it.
        tokenizer: counts by its files and its BOS and EOS.
        settings: what becomes of a record.
    """
    return {
        "version": TOKENIZATION_VERSION,
        "content": content_hash,
        "range": [unit.start, unit.stop],
        "compression": compression(unit.path),
        "reading": {**_as_json(reading), "reader": unit.reader},
        "tokenizer": [tokenizer.digest, tokenizer.bos_id, tokenizer.eos_id],
        "settings": _as_json(settings),
    }


@lru_cache(maxsize=256)  # asked for every unit
def _as_json(settings: "Reading | TextSettings | ChatSettings") -> dict[str, Any]:
    """As they are read back; not to be changed."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return found


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


def surrounding_ids(tokenizer: LoadedTokenizer, settings: TextSettings) -> tuple[int | None, int | None]:
    """Return BOS and EOS where they are wanted.

    Raises:
        ConfigError: the tokenizer has none.
    """
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


class _Batch(NamedTuple):
    """Successive records of a unit."""

    texts: list[str]
    records: list[int]
    hashes: list[int]
    sizes: list[int]
    """UTF-8 bytes of each text."""
    bad: list[BadRecord]
    lines: int
    """Of the whole unit, in its last batch; else 0."""


def _batches(items: Iterable[Item]) -> Iterator[_Batch]:
    """Group items of about BATCH_BYTES of text; what comes out of a unit does not depend on the grouping."""
    batch, size = _Batch([], [], [], [], [], 0), 0
    for item in items:
        data = item.text.encode() if isinstance(item, Document) else b""
        item_size = len(data) + PREVIEW_BYTES  # of an empty text or a bad record, about what keeping it takes
        if size and size + item_size > BATCH_BYTES:
            yield batch
            batch, size = _Batch([], [], [], [], [], 0), 0
        size += item_size
        if isinstance(item, Document):
            batch.texts.append(item.text)
            batch.records.append(item.record)
            batch.hashes.append(hash_text(data))
            batch.sizes.append(len(data))
        elif isinstance(item, BadRecord):
            batch.bad.append(item)
        else:
            assert isinstance(item, End), "text is read as documents"
            batch = batch._replace(lines=item.lines)
    yield batch


class Texts(NamedTuple):
    """What the guard knows of the texts of a batch."""

    texts: list[str]
    records: list[int]
    hashes: list[int]
    sizes: list[int]
    """UTF-8 bytes."""


def compare_engines(
    unit: Unit,
    batch: Texts,
    encoded: Encoded,
    engines: tuple[Engine, Engine],
    counts: Counter[str],
    begins_source: bool,
) -> None:
    """Compare the fast engine with the reference on the sample, and on first documents where the unit begins a source.

    Raises:
        EngineDiffers: they differ.
    """
    fast, reference = engines
    is_chosen = sampled(np.array(batch.hashes, np.uint64))
    if begins_source:
        sizes = np.array(batch.sizes, np.int64)
        is_chosen |= counts["guarded_bytes"] + np.cumsum(sizes) - sizes < FIRST_BYTES
        counts["guarded_bytes"] += int(sizes.sum())
    chosen = np.flatnonzero(is_chosen).tolist()
    counts["compared"] += len(chosen)
    texts, ids = chosen_ids(batch.texts, encoded, chosen, fast.encode)
    difference = first_difference(texts, ids, reference.encode)
    if difference is not None:
        number, how = difference
        line = documents.lines_before(unit) + batch.records[chosen[number]] + 1
        raise EngineDiffers(
            f"{unit.path}:{line}: {fast.name} does not give the tokens of {reference.name}: {how}; what it made with "
            f"this tokenizer will not be used; run the same command again: `engine: auto` now takes the reference",
            fast.name,
        )


def _control_ids(encoded: Encoded, find: Callable[[NDArray[np.uint32]], NDArray[np.intp]]) -> Iterator[tuple[int, int]]:
    """The texts that became control tokens all the same, with every such id."""
    places = find(encoded.ids)
    yield from zip(text_of_place(encoded, places).tolist(), encoded.ids[places].tolist(), strict=True)


def _becomes_control(token_id: int, tokenizer: LoadedTokenizer) -> str:
    token = tokenizer.backend.id_to_token(token_id)
    return (
        f"the text becomes the control token {token!r} (id {token_id}), which the vocabulary has as a plain token too"
    )


def _write(
    writer: UnitWriter, counts: Counter[str], batch: _Batch, encoded: Encoded, reasons: Mapping[int, str]
) -> None:
    refused = [BadRecord(batch.records[i], reason, shown(batch.texts[i])) for i, reason in reasons.items()]
    bad = sorted([*batch.bad, *refused])
    for record in bad:
        writer.quarantine(record)
    is_stored = encoded.lengths > 0
    records, hashes = np.array(batch.records, np.uint32), np.array(batch.hashes, np.uint64)
    writer.add(encoded.ids, encoded.lengths[is_stored], records[is_stored], hashes[is_stored])
    stored = int(is_stored.sum())
    counts.update(
        records=len(batch.records) + len(batch.bad),
        documents=stored,
        empty=len(batch.records) - len(refused) - stored,
        quarantined=len(bad),
        tokens=len(encoded.ids),
        text_bytes=int(np.array(batch.sizes, np.int64)[is_stored].sum()),
        lines=batch.lines,
    )


def _control_string_message(unit: Unit, record: int, string: str | None) -> str:
    line = documents.lines_before(unit) + record + 1
    return (
        f"{unit.path}:{line}: the text holds the control string {string!r}, and `special_tokens_in_text` is `error`; "
        f"clean the text, or set it to `as_text` (it stays plain text) or `keep` (it becomes the control token)"
    )
