"""What became of one record: as it is in its file, as text, as tokens with what is trained on.

It is done again from the input file with the dataset's own tokenizer, template and settings: where a mask surprises,
this shows on which of the three steps it came to be.
"""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep import documents
from llmt_prep.companions import InputFiles, Place, described, read_files, read_mix
from llmt_prep.config import MixConfig
from llmt_prep.documents import BadRecord, Document, End, Item, Row
from llmt_prep.encoding import surrounded
from llmt_prep.engines import reference_engine
from llmt_prep.inputs import reading_of
from llmt_prep.inspection import TokenRun, control_ids_of, rule, shown_tokens, token_runs
from llmt_prep.report import count
from llmt_prep.tokenization import TextSettings, surrounding_ids
from llmt_prep.tokenizer import LoadedTokenizer, load_tokenizer
from llmt_shared.config import StrictModel
from llmt_shared.dataset import Dataset
from llmt_shared.errors import ConfigError, DataError
from llmt_shared.objects import is_url
from llmt_shared.terminal import escaped

_MOST_SHOWN = 20_000
"""Characters of the record, and of each text, that are shown in a terminal; JSON has all."""


class RenderedText(StrictModel):
    """One text of a record: of a pair its chosen side, then its rejected one."""

    text: str
    """Data: not escaped for a terminal."""
    targets: int
    tokens: tuple[TokenRun, ...]


class RecordView(StrictModel):
    """The whole answer of `llmt-prep inspect --raw`."""

    source: str
    place: str
    record: str
    """As JSON, or the text of a document."""
    left_out: str | None
    """Why there are no tokens of it; ``None`` where there are."""
    texts: tuple[RenderedText, ...]


class _Texts(NamedTuple):
    texts: tuple[str, ...]
    ids: tuple[NDArray[np.uint32], ...]
    is_target: tuple[NDArray[np.bool_], ...]


def inspect_record(dataset: Dataset, said: str) -> RecordView:
    """Do again what packing did with one record.

    Args:
        dataset: open dataset.
        said: SOURCE:RECORD, of which RECORD is the record's number in its source, from 0.

    Raises:
        ConfigError: no such source or record, or its file is not there any more.
        DataError: the file has changed.
    """
    config, files = read_mix(dataset.folder), read_files(dataset.folder)
    place = _place(files, dataset.sources, said)
    item = _read(files, config, place)
    tokenizer = load_tokenizer(str(dataset.tokenizer_dir), None, config.tokenizer.eos_token, config.tokenizer.bos_token)
    left_out, found = _tokenized(config, tokenizer, place, item)
    control = control_ids_of(dataset, tokenizer.backend)
    return RecordView(
        source=place.source,
        place=described(place, config.sources),
        record=_shown(item),
        left_out=left_out,
        texts=tuple(
            RenderedText(
                text=text,
                targets=int(is_target.sum()),
                tokens=tuple(token_runs(tokenizer.backend, ids.tolist(), is_target.tolist(), control)),
            )
            for text, ids, is_target in zip(*found, strict=True)
        ),
    )


def render(view: RecordView, is_coloured: bool) -> str:
    """Return the record as text: raw, rendered, tokens; colours as in `inspection.render`."""
    parts = [rule(f"{view.source}  {escaped(view.place)}"), _cut(view.record)]
    if view.left_out is not None:
        parts.append(rule(f"left out: {escaped(view.left_out)}"))
    names = ("chosen", "rejected") if len(view.texts) == 2 else ("",)
    for name, each in zip(names, view.texts, strict=False):
        tokens = sum(len(run.ids) for run in each.tokens)
        parts += [rule(f"{name} text: {count(len(each.text))} characters".strip()), _cut(each.text)]
        parts += [rule(f"{name} tokens: {count(tokens)}, {count(each.targets)} of them targets".strip())]
        parts += [shown_tokens(each.tokens, is_coloured)]
    return "\n".join(parts)


def _cut(text: str) -> str:
    rest = len(text) - _MOST_SHOWN
    return escaped(text[:_MOST_SHOWN]) + (f"\n({count(rest)} more characters)" if rest > 0 else "")


def _place(files: InputFiles, sources: tuple[str, ...], said: str) -> Place:
    source, _, number = said.rpartition(":")
    if source not in sources or not number.isdecimal():
        raise ConfigError(f"--raw {said}: wanted SOURCE:RECORD, such as {sources[0]}:0; sources: {', '.join(sources)}")
    records = np.diff(np.append(files.first_document.astype(np.int64), files.num_records))
    left = int(number)
    for path, of_source, size in zip(files.path, files.source, records.tolist(), strict=True):
        if of_source == source and left < size:
            return Place(source, path, left)
        left -= size if of_source == source else 0
    total = int(records[np.array(files.source) == source].sum())
    raise ConfigError(f"--raw {said}: source {source} has {total} records; wanted 0 .. {total - 1}")


def _read(files: InputFiles, config: MixConfig, place: Place) -> Item:
    if not is_url(place.path) and not Path(place.path).is_file():
        raise ConfigError(f"{place.path}: no such file here, and records are read from it; bring it back to this path")
    reading = reading_of(config, config.sources[place.source])
    for unit in documents.split_into_units(place.path, reading.reader, 2**62):  # one unit
        for item in documents.read(unit, reading):
            if not isinstance(item, End) and item.record == place.record:
                return item
    raise DataError(f"{place.path}: has no record {place.record + 1} any more; it changed since it was packed")


def _tokenized(
    config: MixConfig, tokenizer: LoadedTokenizer, place: Place, item: Item
) -> tuple[str | None, _Texts | tuple[()]]:
    """Why a record is left out, if it is, and its texts with their tokens."""
    nothing = _Texts((), (), ())
    if isinstance(item, BadRecord):
        return item.reason, nothing
    if isinstance(item, Document):
        return None, _of_document(config, tokenizer, item.text)
    assert isinstance(item, Row), "records are documents or rows"
    try:
        return _of_chat(config, tokenizer, place.source, item)
    except ValueError as error:
        return str(error), nothing


def _of_document(config: MixConfig, tokenizer: LoadedTokenizer, text: str) -> _Texts:
    settings = TextSettings(config.special_tokens_in_text, config.bos, config.eos)
    engine = reference_engine(tokenizer, keep_control=settings.special_tokens_in_text == "keep")
    ids, _ = surrounded(engine.encode([text]), *surrounding_ids(tokenizer, settings))
    return _Texts((text,), (ids,), (np.arange(len(ids)) > 0,))


def _of_chat(config: MixConfig, tokenizer: LoadedTokenizer, source: str, row: Row) -> tuple[str | None, _Texts]:
    from llmt_prep.chat.offsets import encoding_with_extents
    from llmt_prep.chat.prepare import preparing
    from llmt_prep.chat.settings import chat_settings
    from llmt_prep.chat.template import load_template
    from llmt_prep.chat.tokenization import runs_of

    settings = chat_settings(config, tokenizer)[list(config.sources).index(source)]
    prepared = preparing(settings, load_template("auto", tokenizer), tokenizer)(row.record, row.value)
    encoding = encoding_with_extents(tokenizer)(prepared.texts, None, Counter())
    runs = runs_of([prepared], encoding)
    lengths = encoding.encoded.lengths
    is_target = [np.zeros(length, np.bool_) for length in lengths]
    for text, start, length in zip(runs.text, runs.start, runs.length, strict=True):
        is_target[text][start : start + length] = True
    ids = np.split(encoding.encoded.ids, np.cumsum(lengths)[:-1])
    reason = next(iter(encoding.reasons.values()), None)
    if reason is None and not all(each.any() for each in is_target):
        reason = "nothing in it is to be trained on"
    return reason, _Texts(prepared.texts, tuple(ids), tuple(is_target))


def _shown(item: Item) -> str:
    if isinstance(item, Row):
        try:
            return json.dumps(item.value, indent=1, ensure_ascii=False, default=str)
        except RecursionError:
            return "nested too deep to be shown"
    return item.text if isinstance(item, Document) else item.preview if isinstance(item, BadRecord) else ""
