"""How much of each source goes into the dataset, from the sources' totals and, for part of an epoch, its order.

Tokens are tokens that land in rows: what truncating or dropping takes away does not count. A source gives whole
documents, each once per epoch, and epoch k + 1 begins when epoch k has ended.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep.order import Documents
from llmt_shared.errors import ConfigError, DataError

MOST = 1 << 60
"""Tokens, and documents, that a plan may select: what 64-bit places of documents can tell apart."""


@dataclass(frozen=True)
class Source:
    """One corpus of the mixture; at most one of the three amounts, and none means ``epochs`` 1."""

    name: str
    documents: int
    """Documents that may be trained on."""
    available: int
    """Tokens of them that land in rows: those of one epoch."""
    in_order: Callable[[int], Iterator[Documents]]
    """Yields these documents, piece by piece, in the order of an epoch (from 0)."""
    landing: Callable[[Documents], NDArray[np.int64]]
    """How many tokens of documents land in rows."""
    weight: float | None = None
    epochs: float | None = None
    tokens: int | None = None


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


def plan(
    sources: Sequence[Source],
    budget: int | Literal["max"] | None,
    max_epochs: float = 1.0,
) -> Mixture:
    """Decide how many tokens each source gives.

    Sources with ``tokens`` or ``epochs`` take theirs first; those with ``weight`` share the rest of the budget in
    proportion. ``max`` is the largest budget whose shares need at most ``max_epochs`` of any weighted source.
    ``max_epochs`` also bounds ``tokens``, but not ``epochs``, which says what it wants.

    Raises:
        ConfigError: amounts that exclude each other, a weight without a budget, a budget that the sources cannot meet
            exactly, a source that would be repeated more than ``max_epochs`` times, or more than ``MOST`` tokens.
            Nothing is capped.
        DataError: no token of a source lands in a row.
    """
    limit = _exact(max_epochs)
    _check_amounts(sources, budget, limit)
    _check_available(sources)
    fixed = [_fixed(source, limit) for source in sources]
    rest = _rest(sources, sum(fixed), budget, limit)
    total_weight = sum((_weight(source) for source in sources), Fraction(0)) or Fraction(1)
    wanted = [
        amount or max(1, math.floor(rest * _weight(source) / total_weight))
        for source, amount in zip(sources, fixed, strict=True)
    ]
    _check_countable(sources, wanted)
    selections = [_select(source, amount) for source, amount in zip(sources, wanted, strict=True)]
    return Mixture(sum(fixed) + rest, tuple(selections))


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


def _check_available(sources: Sequence[Source]) -> None:
    for source in sources:
        if source.available == 0:
            raise DataError(
                f"sources.{source.name}: none of its {source.documents:,} documents has a token that lands in a row "
                f"(the others are empty, held out or quarantined; `overflow: drop` leaves out those longer than a "
                f"row); check its path and field, make rows longer, or remove it"
            )


def _check_countable(sources: Sequence[Source], wanted: Sequence[int]) -> None:
    documents = [
        -(-amount // source.available) * source.documents for source, amount in zip(sources, wanted, strict=True)
    ]
    for amounts, unit in ((wanted, "tokens"), (documents, "documents")):
        if sum(amounts) > MOST:
            most = max(range(len(sources)), key=amounts.__getitem__)
            raise ConfigError(
                f"sources.{sources[most].name}: more than 2^60 {unit} would be selected, repeats included, most of "
                f"them here; ask for fewer epochs or tokens"
            )


def _fixed(source: Source, limit: Fraction) -> int:
    """Tokens that a source takes before the budget is shared; 0 for a weighted one, which takes none."""
    if source.weight is not None:
        return 0
    if source.tokens is None:
        return max(1, round(_exact(1.0 if source.epochs is None else source.epochs) * source.available))
    if source.tokens > limit * source.available:
        raise ConfigError(
            f"sources.{source.name}.tokens: wants {source.tokens:,} of {source.available:,} available tokens, which is "
            f"{source.tokens / source.available:.4g} epochs; max_epochs {float(limit):g} allows "
            f"{math.floor(limit * source.available):,}; ask for less, or raise max_epochs"
        )
    return source.tokens


def _rest(sources: Sequence[Source], taken: int, budget: int | str | None, limit: Fraction) -> int:
    """Tokens that the weighted sources share; 0 when there are none."""
    total_weight = sum((_weight(source) for source in sources), Fraction(0))
    if not total_weight:
        _check_budget_without_weights(budget, taken)
        return 0
    if budget is None:
        name = next(source.name for source in sources if source.weight is not None)
        raise ConfigError(f"sources.{name}.weight: a weight shares a budget; set `budget` to tokens (20B) or to `max`")
    by_feasible_rest = [
        (limit * source.available * total_weight / _weight(source), source)
        for source in sources
        if source.weight is not None
    ]
    feasible, scarcest = min(by_feasible_rest, key=lambda entry: entry[0])
    rest = math.floor(feasible) if budget == "max" else int(budget) - taken
    if rest <= 0:
        raise ConfigError(
            f"budget: {budget} leaves nothing for the sources with a weight, as the sources with epochs or tokens "
            f"take {taken:,}; set it above that, up to {taken + math.floor(feasible):,}"
        )
    if rest > feasible:
        wanted = math.floor(rest * _weight(scarcest) / total_weight)
        raise ConfigError(
            f"sources.{scarcest.name}.weight: its share of budget {int(budget):,} wants {wanted:,} of "
            f"{scarcest.available:,} available tokens, which is {wanted / scarcest.available:.4g} epochs; max_epochs "
            f"is {float(limit):g}; the largest feasible budget is {taken + math.floor(feasible):,} (`budget: max`); "
            f"or lower the weight, or raise max_epochs"
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


def _select(source: Source, wanted: int) -> Selection:
    whole, remainder = divmod(wanted, source.available)
    extra, tokens = _cut(source, remainder, whole) if remainder else (0, 0)
    if tokens == source.available:
        whole, extra, tokens = whole + 1, 0, 0
    got = whole * source.available + tokens
    return Selection(source.name, source.documents, source.available, wanted, got, whole, extra)


def _cut(source: Source, wanted: int, epoch: int) -> tuple[int, int]:
    """Documents and tokens of the epoch's beginning that is nearest to ``wanted``; the shorter of two equally near."""
    documents = tokens = 0
    for piece in source.in_order(epoch):
        ends = tokens + np.cumsum(source.landing(piece))
        crossing = int(np.searchsorted(ends, wanted))
        if crossing < len(ends):
            before, after = int(ends[crossing - 1]) if crossing else tokens, int(ends[crossing])
            is_first_of_source = epoch == 0 and before == 0
            if is_first_of_source or after - wanted < wanted - before:
                return documents + crossing + 1, after
            return documents + crossing, before
        documents, tokens = documents + len(ends), int(ends[-1])
    raise AssertionError(f"{source.name}: {tokens} tokens in epoch {epoch}, not {source.available}")
