"""One row of a dataset as people read it: its segments, where each comes from, its tokens, which are targets."""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmt_prep.companions import InputFiles, Place, described, place_of, read_files, read_mix
from llmt_prep.report import DIM, GREENS, REVERSE, count, styled
from llmt_shared.config import StrictModel
from llmt_shared.dataset import Dataset, Row, Split
from llmt_shared.errors import ConfigError, FormatError
from llmt_shared.segments import IGNORE
from llmt_shared.terminal import escaped

_RULE_WIDTH = 100
_MOST_TOKENS_OF_A_CHARACTER = 4  # UTF-8 has at most four bytes
_REPLACEMENT = "\ufffd"


class TokenRun(StrictModel):
    """One token, or the few that only together are a character."""

    ids: tuple[int, ...]
    text: str
    """Decoded; bytes that are no text are written like ``\\xe2``. Data: not escaped for a terminal."""
    targets: int
    """How many of the ids are targets."""
    is_control: bool
    """BOS, EOS, padding or another special token of the tokenizer."""


class SegmentView(StrictModel):
    """One segment of the row."""

    number: int
    """Its segment id, from 1."""
    source: str
    file: str
    record: int
    """Physical line or row of the file, from 0."""
    place: str
    """``file:line`` from 1, or ``file row N`` from 0 for Parquet and Arrow, or the file alone if it is one document."""
    document: int
    """Provenance number."""
    offset: int
    """Tokens of the document before the segment."""
    length: int
    side: str | None
    """``chosen`` or ``rejected``, of a preference pair."""
    tokens: tuple[TokenRun, ...]


class RowView(StrictModel):
    """The whole answer of `llmt-prep inspect`."""

    split: str
    row: int
    length: int
    targets: int
    padding: int
    segments: tuple[SegmentView, ...]


def inspect_row(dataset: Dataset, split: str, row: int) -> RowView:
    """Decode one row.

    Args:
        dataset: open dataset.
        split: ``train`` or ``validation``.
        row: from 0.

    Raises:
        ConfigError: no such split or row.
        FormatError: the tokenizer, the mix or the list of input files is damaged.
    """
    chosen = _split(dataset, split)
    if not 0 <= row < len(chosen):
        raise ConfigError(f"row {row}: split {split!r} has {len(chosen)} rows; wanted 0 .. {len(chosen) - 1}")
    found = chosen[row]
    is_target = np.append(False, found.labels[:-1] != IGNORE)  # the token before a target has it as its label
    real = int(found.segments.length.sum(dtype=np.int64))
    return RowView(
        split=split,
        row=row,
        length=chosen.length,
        targets=int(is_target.sum()),
        padding=chosen.length - real,
        segments=tuple(_segments(dataset, found, is_target)),
    )


def render(view: RowView, is_coloured: bool) -> str:
    """Return the row as text: a rule before each segment, then its tokens.

    Args:
        view: the row.
        is_coloured: targets are green (two shades take turns, so that tokens can be told apart), other tokens dim,
            control tokens reversed. Otherwise what is no target stands in ⟨ ⟩, control tokens in ⟦ ⟧.
    """
    legend = "green: target, dim: no target" if is_coloured else "⟨no target⟩, ⟦control token⟧"
    segments = "1 segment" if len(view.segments) == 1 else f"{len(view.segments)} segments"
    counts = f"{segments}, {count(view.targets)} targets, {count(view.padding)} padding"
    parts = [f"{view.split} row {view.row}: {count(view.length)} tokens, {counts} ({legend})"]
    for segment in view.segments:
        parts += [rule(_title(segment)), shown_tokens(segment.tokens, is_coloured)]
    return "\n".join([*parts, rule(f"{count(view.padding)} tokens of padding" if view.padding else "full")])


def shown_tokens(tokens: tuple[TokenRun, ...], is_coloured: bool) -> str:
    """Return tokens as text; colours and marks as in `render`."""
    return _coloured(tokens) if is_coloured else _plain(tokens)


def _split(dataset: Dataset, name: str) -> Split:
    splits = {"train": dataset.train} | ({"validation": dataset.validation} if dataset.validation is not None else {})
    if name not in splits:
        raise ConfigError(f"split {name!r}: {dataset.path} has no such split; it has {', '.join(splits)}")
    return splits[name]


def _segments(dataset: Dataset, row: Row, is_target: NDArray[np.bool_]) -> Iterator[SegmentView]:
    files, sources, tokenizer = read_files(dataset.folder), read_mix(dataset.folder).sources, _tokenizer(dataset)
    control = control_ids_of(dataset, tokenizer)
    ends = np.cumsum(row.segments.length, dtype=np.int64)
    columns = (row.segments.length, row.segments.offset, row.segments.document)
    for number, (end, length, offset, document) in enumerate(
        zip(ends.tolist(), *(column.tolist() for column in columns), strict=True), start=1
    ):
        mine = slice(end - length, end)
        place = _place(dataset, files, document)
        yield SegmentView(
            number=number,
            source=place.source,
            file=place.path,
            record=place.record,
            place=described(place, sources),
            document=document,
            offset=offset,
            length=length,
            side=("chosen", "rejected")[(number - 1) % 2] if dataset.manifest.kind == "preference" else None,
            tokens=tuple(token_runs(tokenizer, row.tokens[mine].tolist(), is_target[mine].tolist(), control)),
        )


def _place(dataset: Dataset, files: InputFiles, document: int) -> Place:
    place = place_of(files, document)
    if place.source not in dataset.sources:
        raise FormatError(f"{dataset.path}/files.parquet: unknown source {place.source!r}; run `llmt-prep verify`")
    return place


def _tokenizer(dataset: Dataset) -> Tokenizer:
    path = dataset.tokenizer_dir / "tokenizer.json"
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"{path}: cannot be read: {error}; run `llmt-prep verify`") from None


def control_ids_of(dataset: Dataset, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that are shown as control tokens."""
    said = dataset.manifest.tokenizer
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return frozenset(special | {index for index in (said.bos_id, said.eos_id, said.pad_id) if index is not None})


def token_runs(
    tokenizer: Tokenizer, ids: list[int], is_target: list[bool], control: frozenset[int]
) -> Iterator[TokenRun]:
    """Yield the ids one by one, but those of one character together.

    A token's text is what it adds to the text of the run before it: only so decoders keep their spaces.
    """
    before = start = 0
    bytes_of = _byte_alphabet(tokenizer)
    for end in range(1, len(ids) + 1):
        is_control = ids[end - 1] in control
        text = tokenizer.id_to_token(ids[end - 1]) if is_control else _added_text(tokenizer, ids, before, start, end)
        is_open = text is not None and text.endswith(_REPLACEMENT) and end - start < _MOST_TOKENS_OF_A_CHARACTER
        if is_open and end < len(ids) and ids[end] not in control:
            continue
        if text is None:
            text = f"<{ids[end - 1]}>"  # no token of this tokenizer
        elif _REPLACEMENT in text:
            text = _with_bytes([tokenizer.id_to_token(index) or "" for index in ids[start:end]], bytes_of)
        targets = sum(is_target[start:end])
        yield TokenRun(ids=tuple(ids[start:end]), text=text, targets=targets, is_control=is_control)
        before, start = start, end


def _added_text(tokenizer: Tokenizer, ids: list[int], before: int, start: int, end: int) -> str | None:
    if tokenizer.id_to_token(ids[end - 1]) is None:
        return None
    context = tokenizer.decode(ids[before:start], skip_special_tokens=False)
    text: str = tokenizer.decode(ids[before:end], skip_special_tokens=False)
    if text.startswith(context):
        return text[len(context) :]
    alone: str = tokenizer.decode(ids[start:end], skip_special_tokens=False)
    return alone


def _with_bytes(tokens: list[str], bytes_of: dict[str, int]) -> str:
    """Text of tokens; bytes that are no text become escapes."""
    return b"".join(_bytes(token, bytes_of) for token in tokens).decode("utf-8", "backslashreplace")


def _bytes(token: str, bytes_of: dict[str, int]) -> bytes:
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(match[1], 16)])
    if bytes_of and all(character in bytes_of for character in token):
        return bytes(bytes_of[character] for character in token)
    return token.encode()


@lru_cache(maxsize=1)  # the whole tokenizer as JSON, which is slow, once and not for every segment
def _byte_alphabet(tokenizer: Tokenizer) -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary; empty for another kind.

    Source: GPT-2's bytes_to_unicode: printable Latin-1 stands for itself, the other bytes for 256, 257, ..
    """
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    if not any(each.get("type") == "ByteLevel" for each in (decoder, *decoder.get("decoders", []))):
        return {}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _title(segment: SegmentView) -> str:
    side = f"{segment.side}  " if segment.side else ""
    return (
        f"{segment.number}  {side}{segment.source}  {escaped(segment.place)}  offset {count(segment.offset)}  "
        f"{count(segment.length)} tokens"
    )


def rule(title: str) -> str:
    """Return a line with a title."""
    return f"── {title} ".ljust(_RULE_WIDTH, "─")


def _coloured(tokens: tuple[TokenRun, ...]) -> str:
    return "".join(styled(escaped(run.text), *_style(run, place)) for place, run in enumerate(tokens))


def _style(run: TokenRun, place: int) -> tuple[int, ...]:
    return (GREENS[place % 2] if run.targets else DIM, *((REVERSE,) if run.is_control else ()))


def _plain(tokens: tuple[TokenRun, ...]) -> str:
    shown = []
    for is_target, runs in groupby(tokens, lambda run: run.targets > 0):
        text = "".join(f"⟦{escaped(run.text)}⟧" if run.is_control else escaped(run.text) for run in runs)
        shown.append(text if is_target else f"⟨{text}⟩")
    return "".join(shown)
