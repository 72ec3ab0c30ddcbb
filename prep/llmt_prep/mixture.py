"""How much of each source goes into the dataset, and in which order: pure functions of counts, settings and a seed.

Tokens are tokens that land in rows: what truncating or dropping takes away does not count. A source gives whole
documents, each once per epoch, and epoch k + 1 begins when epoch k has ended.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_shared.errors import ConfigError, DataError
from llmt_shared.order import mix, shuffled

HELD_OUT_SALT = 0x6C6C6D742D76616C
"""Changing it would move documents between training and validation."""


@dataclass(frozen=True)
class Source:
    """One corpus of the mixture; at most one of the three amounts, and none means ``epochs`` 1."""

    name: str
    lengths: NDArray[np.integer]
    """[D]; stored tokens of each document that may be trained on, in store order."""
    landing: NDArray[np.integer]
    """[D]; those of them that land in rows."""
    weight: float | None = None
    epochs: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Shuffling:
    """What the order of documents depends on, apart from the documents."""

    seed: int
    block_tokens: int = 1 << 25
    """Tokens that are read together: 64 MB of two-byte tokens."""
    group_tokens: int = 1 << 29
    """Tokens among which documents are shuffled: 1 GB; a source up to this size is shuffled fully."""


class Selection(NamedTuple):
    """What one source gives: ``whole_epochs`` times everything, then the first documents of one more epoch's order."""

    name: str
    documents: int
    """Documents of the source."""
    available: int
    """Tokens of one epoch."""
    wanted: int
    """Tokens asked for."""
    got: int
    """Tokens of the documents selected, with repeats: nearest to ``wanted``, but at least one document."""
    whole_epochs: int
    extra_documents: int

    @property
    def epochs(self) -> float:
        """How often the source is seen, by tokens."""
        return self.got / self.available

    @property
    def selected(self) -> int:
        """Documents selected, with repeats."""
        return self.whole_epochs * self.documents + self.extra_documents


class Mixture(NamedTuple):
    """The plan of a dataset's contents."""

    budget: int
    """Tokens asked for, all sources together."""
    selections: tuple[Selection, ...]
    """One for each source, in the same order."""


class Window(NamedTuple):
    """Documents that are packed together, sources mixed in proportion."""

    source: NDArray[np.uint16]
    """[documents]; index of the source."""
    document: NDArray[np.int64]
    """[documents]; index in the source."""


class _Placed(NamedTuple):
    """Documents of one source, in order."""

    document: NDArray[np.int64]
    place: NDArray[np.float64]
    """Share of the source's tokens before the document's middle: rises from 0 to 1."""


def plan(
    sources: Sequence[Source],
    budget: int | Literal["max"] | None,
    shuffling: Shuffling,
    max_epochs: float = 1.0,
) -> Mixture:
    """Decide how many tokens each source gives.

    Sources with ``tokens`` or ``epochs`` take theirs first; those with ``weight`` share the rest of the budget in
    proportion. ``max`` is the largest budget whose shares need at most ``max_epochs`` of any weighted source.
    ``max_epochs`` also bounds ``tokens``, but not ``epochs``, which says what it wants.

    Raises:
        ConfigError: amounts that exclude each other, a weight without a budget, a budget that the sources cannot meet
            exactly, or a source that would be repeated more than ``max_epochs`` times. Nothing is capped.
        DataError: no token of a source lands in a row.
    """
    limit = _exact(max_epochs)
    _check_amounts(sources, budget, limit)
    available = [_available(source) for source in sources]
    fixed = [_fixed(source, own, limit) for source, own in zip(sources, available, strict=True)]
    rest = _rest(sources, available, sum(fixed), budget, limit)
    total_weight = sum((_weight(source) for source in sources), Fraction(0)) or Fraction(1)
    wanted = [
        amount or max(1, math.floor(rest * _weight(source) / total_weight))
        for source, amount in zip(sources, fixed, strict=True)
    ]
    selections = [_select(*parts, shuffling) for parts in zip(sources, available, wanted, strict=True)]
    return Mixture(sum(fixed) + rest, tuple(selections))


def document_order(lengths: NDArray[np.integer], name: str, epoch: int, shuffling: Shuffling) -> NDArray[np.int64]:
    """Return the order in which an epoch takes a source's documents: [D].

    The source is cut into blocks of neighbouring documents; blocks are permuted, and documents are shuffled inside
    groups of successive blocks, so that reading needs one group at a time. The order depends on the source's name, not
    on the other sources.

    Args:
        lengths: [D] stored tokens, in store order.
        name: of the source.
        epoch: from 0; each has its own order.
        shuffling: seed and sizes.
    """
    keys = (shuffling.seed, _key_of(name), epoch)
    ends = np.cumsum(lengths, dtype=np.int64)
    if not len(ends) or ends[-1] <= shuffling.group_tokens:
        return shuffled(len(ends), *keys)
    block_of_document = (ends - lengths) // shuffling.block_tokens
    first = np.flatnonzero(np.diff(block_of_document, prepend=-1))
    past = np.append(first[1:], len(ends))
    blocks = shuffled(len(first), *keys, 0)
    per_group = max(1, shuffling.group_tokens // shuffling.block_tokens)
    groups = []
    for start in range(0, len(blocks), per_group):
        chosen = blocks[start : start + per_group]
        documents = np.concatenate([np.arange(first[block], past[block]) for block in chosen])
        groups.append(documents[shuffled(len(documents), *keys, 1 + start)])
    return np.concatenate(groups)


def windows(
    sources: Sequence[Source], mixture: Mixture, shuffling: Shuffling, window_documents: int
) -> Iterator[Window]:
    """Yield all selected documents in windows of ``window_documents``; the last may hold fewer.

    A document's place is the share of its source's tokens that come before its middle, and all sources are merged by
    place: up to any point they have given the same share of their tokens, within half a document. Memory: one epoch's
    order and places of each source, and about one window. ``shuffling`` must be the plan's.
    """
    selected = sum(selection.selected for selection in mixture.selections)
    num_slices = max(1, -(-selected // window_documents))
    streams = [
        _slices(_epochs(source, selection, shuffling), num_slices)
        for source, selection in zip(sources, mixture.selections, strict=True)
    ]
    ready = Window(np.empty(0, np.uint16), np.empty(0, np.int64))
    for parts in zip(*streams, strict=True):
        ready = _joined(ready, _merged(parts))
        num_ready = len(ready.document) // window_documents * window_documents
        for start in range(0, num_ready, window_documents):
            yield _part(ready, start, start + window_documents)
        ready = _part(ready, num_ready, len(ready.document))
    if len(ready.document):
        yield ready


def held_out(text_hash: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Return which documents are kept for validation: a function of each hash alone, so duplicates stay together.

    Args:
        text_hash: [D] hashes of the raw text.
        fraction: of all hashes, in 0..1; 0 keeps none.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"a held-out fraction must lie in 0..1, not {fraction}")
    return mix(np.asarray(text_hash, np.uint64) ^ np.uint64(HELD_OUT_SALT)) < np.uint64(int(fraction * 2**64))


def _check_amounts(sources: Sequence[Source], budget: int | str | None, limit: Fraction) -> None:
    if limit <= 0:
        raise ConfigError(f"max_epochs: {limit} is not above 0")
    if budget is not None and budget != "max" and int(budget) <= 0:
        raise ConfigError(f"budget: {budget} is neither `max` nor a number of tokens above 0")
    for source in sources:
        amounts = {"weight": source.weight, "epochs": source.epochs, "tokens": source.tokens}
        given = {name: value for name, value in amounts.items() if value is not None}
        if len(given) > 1:
            raise ConfigError(f"sources.{source.name}: {' and '.join(given)} exclude each other; keep one of them")
        for name, value in given.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"sources.{source.name}.{name}: {value} is not a number above 0")


def _available(source: Source) -> int:
    tokens = int(source.landing.sum(dtype=np.int64))
    if tokens == 0:
        raise DataError(
            f"sources.{source.name}: none of its {len(source.landing):,} documents has a token that lands in a row "
            f"(the others are empty, held out or quarantined; `overflow: drop` leaves out those longer than a row); "
            f"check its path and field, make rows longer, or remove it"
        )
    return tokens


def _fixed(source: Source, available: int, limit: Fraction) -> int:
    """Tokens that a source takes before the budget is shared; 0 for a weighted one, which takes none."""
    if source.weight is not None:
        return 0
    if source.tokens is None:
        return max(1, round(_exact(1.0 if source.epochs is None else source.epochs) * available))
    if source.tokens > limit * available:
        raise ConfigError(
            f"sources.{source.name}.tokens: wants {source.tokens:,} of {available:,} available tokens, which is "
            f"{source.tokens / available:.4g} epochs; max_epochs {float(limit):g} allows "
            f"{math.floor(limit * available):,}; ask for less, or raise max_epochs"
        )
    return source.tokens


def _rest(
    sources: Sequence[Source], available: Sequence[int], taken: int, budget: int | str | None, limit: Fraction
) -> int:
    """Tokens that the weighted sources share; 0 when there are none."""
    total_weight = sum((_weight(source) for source in sources), Fraction(0))
    if not total_weight:
        _check_budget_without_weights(budget, taken)
        return 0
    if budget is None:
        name = next(source.name for source in sources if source.weight is not None)
        raise ConfigError(f"sources.{name}.weight: a weight shares a budget; set `budget` to tokens (20B) or to `max`")
    by_feasible_rest = [
        (limit * own * total_weight / _weight(source), source, own)
        for source, own in zip(sources, available, strict=True)
        if source.weight is not None
    ]
    feasible, scarcest, own = min(by_feasible_rest, key=lambda entry: entry[0])
    rest = math.floor(feasible) if budget == "max" else int(budget) - taken
    if rest <= 0:
        raise ConfigError(
            f"budget: {budget} leaves nothing for the sources with a weight, as the sources with epochs or tokens "
            f"take {taken:,}; set it above that, up to {taken + math.floor(feasible):,}"
        )
    if rest > feasible:
        wanted = math.floor(rest * _weight(scarcest) / total_weight)
        raise ConfigError(
            f"sources.{scarcest.name}.weight: its share of budget {int(budget):,} wants {wanted:,} of {own:,} "
            f"available tokens, which is {wanted / own:.4g} epochs; max_epochs is {float(limit):g}; the largest "
            f"feasible budget is {taken + math.floor(feasible):,} (`budget: max`); or lower the weight, or raise "
            f"max_epochs"
        )
    return rest


def _check_budget_without_weights(budget: int | str | None, taken: int) -> None:
    if budget not in {None, "max", taken}:
        raise ConfigError(
            f"budget: {int(budget or 0):,} tokens, but the sources with epochs or tokens take {taken:,} and none has a "
            f"weight to share the rest; remove `budget`, or give a source a weight"
        )


def _weight(source: Source) -> Fraction:
    return Fraction(0) if source.weight is None else _exact(source.weight)


def _exact(number: float) -> Fraction:
    return Fraction(str(number))  # the decimal that was written: 0.3 epochs of 10 tokens are 3, not 2


def _select(source: Source, available: int, wanted: int, shuffling: Shuffling) -> Selection:
    whole, remainder = divmod(wanted, available)
    extra, tokens = _cut(source, remainder, whole, shuffling) if remainder else (0, 0)
    if tokens == available:
        whole, extra, tokens = whole + 1, 0, 0
    got = whole * available + tokens
    return Selection(source.name, len(source.landing), available, wanted, got, whole, extra)


def _cut(source: Source, wanted: int, epoch: int, shuffling: Shuffling) -> tuple[int, int]:
    """Documents and tokens of the epoch's beginning that is nearest to ``wanted``; the shorter of two equally near."""
    order = document_order(source.lengths, source.name, epoch, shuffling)
    ends = np.cumsum(source.landing[order], dtype=np.int64)
    crossing = int(np.searchsorted(ends, wanted))
    before, after = int(ends[crossing - 1]) if crossing else 0, int(ends[crossing])
    is_first_of_source = epoch == 0 and before == 0
    if is_first_of_source or after - wanted < wanted - before:
        return crossing + 1, after
    return crossing, before


def _key_of(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _epochs(source: Source, selection: Selection, shuffling: Shuffling) -> Iterator[_Placed]:
    for epoch in range(selection.whole_epochs + (selection.extra_documents > 0)):
        order = document_order(source.lengths, source.name, epoch, shuffling)
        if epoch == selection.whole_epochs:
            order = order[: selection.extra_documents]
        tokens = source.landing[order].astype(np.int64)
        middle = 2 * (epoch * selection.available + np.cumsum(tokens)) - tokens
        yield _Placed(order, middle / (2 * selection.got))


def _slices(epochs: Iterator[_Placed], num_slices: int) -> Iterator[_Placed]:
    """Cut one source's documents where their places cross 1/n, 2/n, ..., across the borders of epochs."""
    rest = _Placed(np.empty(0, np.int64), np.empty(0, np.float64))
    for number in range(1, num_slices + 1):
        edge = number / num_slices if number < num_slices else math.inf
        parts = []
        while True:
            end = int(np.searchsorted(rest.place, edge))
            parts.append(_Placed(rest.document[:end], rest.place[:end]))
            rest = _Placed(rest.document[end:], rest.place[end:])
            if len(rest.place) or (following := next(epochs, None)) is None:
                break
            rest = following
        yield _Placed(np.concatenate([part.document for part in parts]), np.concatenate([part.place for part in parts]))


def _merged(parts: Sequence[_Placed]) -> Window:
    source = np.repeat(np.arange(len(parts), dtype=np.uint16), [len(part.place) for part in parts])
    order = np.argsort(np.concatenate([part.place for part in parts]), kind="stable")
    return Window(source[order], np.concatenate([part.document for part in parts])[order])


def _joined(first: Window, second: Window) -> Window:
    return Window(np.concatenate([first.source, second.source]), np.concatenate([first.document, second.document]))


def _part(window: Window, start: int, end: int) -> Window:
    return Window(window.source[start:end], window.document[start:end])
