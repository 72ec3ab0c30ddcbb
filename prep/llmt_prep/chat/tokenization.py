"""A unit of chats or pairs becomes a unit of the token store: rendered, tokenized once, with its targets."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from llmt_prep import documents
from llmt_prep.chat.forgery import ControlString, IdCheck
from llmt_prep.chat.messages import UnfitPair
from llmt_prep.chat.offsets import EncodeWithExtents, Encoding, places_in
from llmt_prep.chat.prepare import ChatSettings, Prepare, Prepared
from llmt_prep.chat.targets import Runs, target_runs
from llmt_prep.documents import PREVIEW_BYTES, BadRecord, End, Item, Reading, Row, Unit, shown
from llmt_prep.encoding import only
from llmt_prep.engines import Engine, reference_engine
from llmt_prep.store import COUNTED, Targets, UnitMeta, UnitWriter, token_dtype, writing_unit
from llmt_prep.tokenization import BATCH_BYTES, Texts, compare_engines
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_shared.errors import DataError


class ChatTools(NamedTuple):
    """What is made once for a tokenizer and settings."""

    prepare: Prepare
    encode: EncodeWithExtents
    check_ids: IdCheck | None
    """``None`` where records may hold control strings."""


class _Batch(NamedTuple):
    """Successive records of a unit."""

    items: list[Prepared]
    bad: list[BadRecord]

    @property
    def texts(self) -> list[str]:
        """Of all items, one after another."""
        return [text for item in self.items for text in item.texts]


def tokenize_chats(
    unit: Unit,
    reading: Reading,
    tokenizer: LoadedTokenizer,
    settings: ChatSettings,
    tools: ChatTools,
    directory: Path,
    check: Callable[[], None] = lambda: None,
    fast: Engine | None = None,
    begins_source: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> UnitMeta:
    """Write one unit of the token store; as `tokenize_unit`, but for what a record becomes.

    Args:
        unit: what to read.
        reading: how to read it; records are given whole.
        tokenizer: its backend is the reference.
        settings: how records become text and targets.
        tools: made for this tokenizer and these settings.
        directory: the folder to make; it appears whole or not at all.
        check: called when all is read; what it raises keeps the unit from appearing.
        fast: an engine to be used in place of the reference, where that needs no offsets.
        begins_source: the guard compares the first documents too, not only its sample.
        origin: what the unit is made of, to be kept with it.

    Raises:
        DataError: the input is damaged, or holds what the settings refuse.
        EngineDiffers: the fast engine does not give what the reference gives.
    """
    counts: Counter[str] = Counter()
    engines: set[str] = set()
    reference = reference_engine(tokenizer, keep_control=True)
    with writing_unit(directory, token_dtype(tokenizer.max_id), origin, has_targets=True) as writer:
        for batch in _batches(unit, documents.read(unit, reading), tools.prepare, settings, counts):
            encoding = tools.encode(batch.texts, fast, counts)
            if tools.check_ids is not None:
                encoding.reasons.update(tools.check_ids(batch.texts, encoding.encoded) | encoding.reasons)
            if fast is not None and encoding.engine == fast.name:
                compare_engines(unit, _texts(batch), encoding.encoded, (fast, reference), counts, begins_source)
            engines.add(encoding.engine)
            _write(writer, unit, batch, encoding, settings, counts)
        check()
        used = fast if fast is not None and fast.name in engines else reference
        return writer.finish({name: counts[name] for name in COUNTED}, used.name)


def _batches(
    unit: Unit, items: Iterable[Item], prepare: Prepare, settings: ChatSettings, counts: Counter[str]
) -> Iterator[_Batch]:
    """Group records of about BATCH_BYTES of text; what comes out of a unit does not depend on the grouping."""
    batch, size = _Batch([], []), 0
    for item in items:
        size += PREVIEW_BYTES
        if isinstance(item, Row):
            counts["records"] += 1
            prepared = _prepared(unit, item, prepare, settings, counts)
            if isinstance(prepared, BadRecord):
                batch.bad.append(prepared)
            elif prepared is not None:
                batch.items.append(prepared)
                size += sum(map(len, prepared.texts))
        elif isinstance(item, BadRecord):
            counts["records"] += 1
            batch.bad.append(item)
        elif isinstance(item, End):
            counts["lines"] += item.lines
        if size > BATCH_BYTES:
            yield batch
            batch, size = _Batch([], []), 0
    yield batch


def _prepared(
    unit: Unit, row: Row, prepare: Prepare, settings: ChatSettings, counts: Counter[str]
) -> Prepared | BadRecord | None:
    """What is tokenized of a record; ``None`` where it is left out and counted."""
    try:
        return prepare(row.record, row.value)
    except UnfitPair as unfit:
        _leave_out(unit, row.record, unfit.fault, str(unfit), settings, counts)
        return None
    except ControlString as found:
        counts["documents_with_control_strings"] += 1
        if settings.special_tokens_in_text == "error":
            raise DataError(
                f"{_place(unit, row.record)}: {found}, and `special_tokens_in_text` is `error`; clean the record, or "
                f"set it to `as_text` (such chats are left out, in quarantine) or `keep`"
            ) from None
        return BadRecord(row.record, str(found), _preview(row))
    except ValueError as error:
        return BadRecord(row.record, str(error), _preview(row))


def _preview(row: Row) -> str:
    try:
        return shown(orjson.dumps(row.value, default=str, option=orjson.OPT_NON_STR_KEYS))
    except TypeError:  # of what is nested some 250 deep
        return shown(", ".join(map(repr, row.value)))


def _leave_out(unit: Unit, record: int, fault: str, reason: str, settings: ChatSettings, counts: Counter[str]) -> None:
    """Count a record with nothing to train on, or stop where the settings say so."""
    if fault in settings.refused:
        raise DataError(
            f"{_place(unit, record)}: {reason}; mend or remove the record, or set `{fault}` to `drop`: such records "
            f"are then left out and counted"
        )
    counts[fault] += 1


def _place(unit: Unit, record: int) -> str:
    return f"{unit.path}:{documents.lines_before(unit) + record + 1}"


def _texts(batch: _Batch) -> Texts:
    """Each text with what its record is known by."""
    texts = batch.texts
    return Texts(
        texts=texts,
        records=[item.record for item in batch.items for _ in item.texts],
        hashes=[item.hash for item in batch.items for _ in item.texts],
        sizes=[len(text) for text in texts],
    )


def _write(
    writer: UnitWriter, unit: Unit, batch: _Batch, encoding: Encoding, settings: ChatSettings, counts: Counter[str]
) -> None:
    """Write what has targets on every side; N texts of D items."""
    item = np.repeat(np.arange(len(batch.items)), [len(each.texts) for each in batch.items])  # [N]
    runs = runs_of(batch.items, encoding)
    has_target = np.bincount(runs.text, minlength=len(item)) > 0
    refused = {int(item[number]): reason for number, reason in encoding.reasons.items()}
    lacking = set(item[~has_target].tolist()) - refused.keys()
    for number in sorted(lacking):
        record = batch.items[number].record
        _leave_out(unit, record, "without_targets", "nothing in it is to be trained on", settings, counts)
    is_kept = np.array([n not in lacking and n not in refused for n in range(len(batch.items))], np.bool_)
    bad = [*batch.bad, *(_unencoded(batch.items[number], reason) for number, reason in refused.items())]
    for record in sorted(bad):
        writer.quarantine(record)
    kept = [each for each, keep in zip(batch.items, is_kept, strict=True) if keep]
    encoded = only(encoding.encoded, is_kept[item])
    targets = _targets(item, encoding.encoded.lengths, runs, is_kept)
    lengths = np.bincount(item, encoded.lengths, len(batch.items)).astype(np.int64)[is_kept]
    writer.add(encoded.ids, lengths, [each.record for each in kept], [each.hash for each in kept], targets)
    counts.update(
        documents=len(kept),
        quarantined=len(bad),
        tokens=len(encoded.ids),
        text_bytes=sum(len(text.encode()) for each in kept for text in each.texts),
        turns=sum(each.turns for each in kept),
        spans=len(targets.span_start),
        target_tokens=int(targets.span_length.sum()),
        straddling=int(runs.straddling[is_kept[item[runs.text]]].sum()),
    )


def runs_of(items: Sequence[Prepared], encoding: Encoding) -> Runs:
    """Return the runs of target tokens of all texts of some records."""
    text_of_span: list[int] = []
    places: list[int] = []
    of_texts = ((text, spans) for each in items for text, spans in zip(each.texts, each.spans, strict=True))
    for number, (text, spans) in enumerate(of_texts):
        if number not in encoding.reasons:
            text_of_span += [number] * len(spans)
            places += places_in(text, [place for span in spans for place in span], encoding.extents.is_bytes)
    lengths = encoding.encoded.lengths
    table = np.array(places, np.int64).reshape(-1, 2)
    return target_runs(encoding.extents, np.cumsum(lengths) - lengths, np.array(text_of_span, np.int64), table)


def _targets(item: NDArray[np.intp], lengths: NDArray[np.int64], runs: Runs, is_kept: NDArray[np.bool_]) -> Targets:
    """The targets of the items that are kept.

    Args:
        item: [texts] number of each text's item.
        lengths: [texts] tokens.
        runs: of all texts.
        is_kept: [items].
    """
    is_second = np.diff(item, prepend=-1) == 0
    before = np.where(is_second, np.roll(lengths, 1), 0)  # tokens of the item before the text
    first_target = np.full(len(is_kept), np.iinfo(np.uint32).max, np.int64)
    np.minimum.at(first_target, item[runs.text], runs.start)
    mine = is_kept[item[runs.text]]
    return Targets(
        first_target=first_target[is_kept],
        chosen_length=np.bincount(item, before, len(is_kept)).astype(np.int64)[is_kept],
        num_spans=np.bincount(item[runs.text], minlength=len(is_kept))[is_kept],
        span_start=(runs.start + before[runs.text])[mine],
        span_length=runs.length[mine],
    )


def _unencoded(item: Prepared, reason: str) -> BadRecord:
    return BadRecord(item.record, reason, shown(item.texts[0]))
