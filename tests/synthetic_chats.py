"""Chats and pairs that are only tokens and targets: as units of the token store, and what must become of them."""

from collections.abc import Sequence
from itertools import count, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from synthetic_corpus import key_of

from llmt_prep.corpus import Corpus, read_corpus
from llmt_prep.order import Documents
from llmt_prep.store import Targets, unit_folder, writing_unit


class Side(NamedTuple):
    """A conversation, or one side of a pair."""

    tokens: list[int]
    is_target: list[bool]
    """At least one; never the first token."""


class Landed(NamedTuple):
    """What of a side lands in a row."""

    offset: int
    """First token, counted from the document's first."""
    side: Side


Chat = tuple[Side, ...]
"""A conversation, or a pair's chosen and rejected side."""


@st.composite
def chats(draw: st.DrawFn, sides: int, max_length: int = 16) -> list[Chat]:
    """Some chats; no two tokens of all are alike."""
    masks = st.lists(st.booleans(), min_size=1, max_size=max_length - 1).filter(any)
    drawn = draw(st.lists(st.tuples(*[masks] * sides), min_size=1, max_size=25))
    return _numbered([[[False, *mask] for mask in chat] for chat in drawn])


def random_chats(number: int, sides: int, max_length: int, seed: int) -> list[Chat]:
    """So many chats of one or two answers, which are targets; prompts have up to half of ``max_length`` tokens."""
    random = np.random.default_rng(seed)

    def mask() -> list[bool]:
        turns = [random.integers(1, max_length // 2), *random.integers(1, max_length // 6, random.choice([1, 3]))]
        return [turn % 2 == 1 for turn, length in enumerate(turns) for _ in range(length)]

    return _numbered([[mask() for _ in range(sides)] for _ in range(number)])


def _numbered(masks: list[list[list[bool]]]) -> list[Chat]:
    token = count(1)
    return [tuple(Side([next(token) for _ in mask], mask) for mask in chat) for chat in masks]


def landed(chat: Chat, capacity: int, overflow: str) -> list[Landed]:
    """What lands in a row of a chat, side by side; nothing where it is dropped."""
    size = sum(len(side.tokens) for side in chat)
    if overflow == "truncate" and size > capacity:
        kept = Side(chat[0].tokens[:capacity], chat[0].is_target[:capacity])
        return [Landed(0, kept)] if any(kept.is_target) else []
    cut = 0  # tokens of each prompt
    while overflow == "truncate_prompt" and size - len(chat) * cut > capacity:
        cut += 1
    shortest_prompt = min(side.is_target.index(True) for side in chat)
    if size - len(chat) * cut > capacity or (cut and cut >= shortest_prompt):
        return []
    starts = [0, len(chat[0].tokens)]
    return [
        Landed(start + cut, Side(side.tokens[cut:], side.is_target[cut:]))
        for start, side in zip(starts, chat, strict=False)
    ]


def write_chats(folder: Path, sources: Sequence[Sequence[Chat]], unit_documents: Sequence[int] | int) -> Corpus:
    """Write units of the token store; document d of source s has the provenance number 1000 s + 2 d.

    Args:
        folder: where the units go.
        sources: the chats of each source.
        unit_documents: documents of every unit, or of one after another, over and over; a source's last has the rest.
    """
    units: list[tuple[int, str]] = []
    numbers: list[int] = []
    for source, of_source in enumerate(sources):
        start = 0
        while start < len(of_source):
            sizes = [unit_documents] if isinstance(unit_documents, int) else unit_documents
            part = of_source[start : start + sizes[len(units) % len(sizes)]]
            write_unit(unit_folder(folder, key_of(len(units))), part)
            units.append((source, key_of(len(units))))
            numbers.append(1000 * source + 2 * start)
            start += len(part)
    corpus = read_corpus(folder, [(source, f"file-{source}") for source in range(len(sources))], units)
    corpus.units["first_record"] = numbers
    return corpus


def write_unit(path: Path, chats: Sequence[Chat]) -> None:
    """Write one unit; of two lines one is blank."""
    tokens = [token for chat in chats for side in chat for token in side.tokens]
    lengths = [sum(len(side.tokens) for side in chat) for chat in chats]
    targets = targets_of(chats)
    counts = {
        "records": len(chats), "documents": len(chats), "empty": 0, "quarantined": 0,
        "documents_with_control_strings": 0, "tokens": len(tokens), "text_bytes": 0, "lines": 2 * len(chats),
        "compared": 0, "fallbacks": 0, "spans": len(targets.span_start),
        "target_tokens": int(targets.span_length.sum()),
    }  # fmt: skip
    with writing_unit(path, np.dtype("<u2"), has_targets=True) as writer:
        records = np.arange(len(chats))
        writer.add(np.array(tokens, np.uint32), np.array(lengths, np.int64), 2 * records, records, targets)
        writer.finish(counts, "synthetic")


def targets_of(chats: Sequence[Chat]) -> Targets:
    """The targets of documents; a run of more than three is two spans that touch, as turns may."""
    spans = [_spans([flag for side in chat for flag in side.is_target]) for chat in chats]
    starts, lengths = np.array([span for each in spans for span in each], np.int64).reshape(-1, 2).T
    return Targets(
        first_target=np.array([min(side.is_target.index(True) for side in chat) for chat in chats], np.int64),
        chosen_length=np.array([len(chat[0].tokens) if len(chat) == 2 else 0 for chat in chats], np.int64),
        num_spans=np.array([len(each) for each in spans], np.int64),
        span_start=starts,
        span_length=lengths,
    )


def _spans(is_target: list[bool]) -> list[tuple[int, int]]:
    """Start and length of the runs."""
    found: list[tuple[int, int]] = []
    for flag, run in groupby(range(len(is_target)), is_target.__getitem__):
        places = list(run)
        parts = [places[:2], places[2:]] if len(places) > 3 else [places]
        found += [(part[0], len(part)) for part in parts if flag]
    return found


def documents_of(corpus: Corpus) -> Documents:
    """All documents, in store order."""
    lengths = corpus.lengths(0, corpus.num_documents)
    number = np.arange(corpus.num_documents)
    return Documents(number, lengths, np.cumsum(lengths) - lengths, corpus.outlines(0, corpus.num_documents))
