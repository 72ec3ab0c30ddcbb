"""What a run would take from the cache, and which field of the rest differs: the answer of `pack --explain-cache`."""

import hashlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llmt_prep.cache import Origin, origin_of, unit_folders
from llmt_prep.config import MixConfig
from llmt_prep.executor import Executor
from llmt_prep.ingest import unusable_units
from llmt_prep.places import Places, full_name_of
from llmt_prep.report import count, size, table
from llmt_shared.config import StrictModel
from llmt_shared.terminal import escaped

_REASONS_SHOWN = 8
_REUSED: tuple[str, ...] = ()
_NEVER_SEEN = ("never seen",)
_NOT_THERE = ("not tokenized yet, or pruned",)


class Amount(StrictModel):
    """Units of work, and the bytes of input that they read."""

    units: int
    bytes: int


class Reason(Amount):
    """Units that cannot be reused, and why."""

    why: tuple[str, ...]
    """All differences from the nearest unit in the cache."""


class SourceUse(StrictModel):
    """One source's units; one that comes twice is tokenized once."""

    reused: Amount
    to_tokenize: Amount
    reasons: tuple[Reason, ...]
    """Of what is to tokenize, most bytes first."""


class CacheUse(StrictModel):
    """What a run would take from the cache."""

    cache: str
    sources: dict[str, SourceUse]


def cache_use(config: MixConfig, places: Places, inexact: frozenset[str], executor: Executor) -> CacheUse:
    """Compare the units of a mix with those in the cache, which are read to see whether they are sound."""
    unusable = unusable_units(places, inexact, executor)
    is_missing = places.are_first() & ~places.are_there()  # what comes again later is tokenized by then
    stored = _Stored(places, np.flatnonzero(is_missing))
    units: list[Counter[tuple[str, ...]]] = [Counter() for _ in config.sources]
    sizes: list[Counter[tuple[str, ...]]] = [Counter() for _ in config.sources]
    for number in range(len(places)):
        if (reason := unusable.get(places.key(number))) is not None:
            why: tuple[str, ...] = (f"the stored unit {reason}",)
        else:
            why = stored.why_not(places[number].origin) if is_missing[number] else _REUSED
        source = int(places.units["source"][number])
        units[source][why] += 1
        sizes[source][why] += places.size(number)
    uses = map(_source_use, units, sizes)
    return CacheUse(cache=str(places.folders[0].parent), sources=dict(zip(config.sources, uses, strict=True)))


def differences(old: Origin, new: Origin) -> tuple[str, ...]:
    """Say in which fields two units differ, but for the ranges of their files."""
    return tuple(_differences(old, new))


def render(use: CacheUse) -> str:
    """Return the answer as text."""
    rows = [
        [name, count(each.reused.units), size(each.reused.bytes), count(each.to_tokenize.units),
         size(each.to_tokenize.bytes)]
        for name, each in use.sources.items()
    ]  # fmt: skip
    lines = [table(["source", "units reused", "input", "to tokenize", "input"], rows)]
    for name, each in use.sources.items():
        lines += ["", f"{name}:"] if each.reasons else []
        for reason in each.reasons[:_REASONS_SHOWN]:
            lines.append(f"  {count(reason.units)} units, {size(reason.bytes)}: {escaped('; '.join(reason.why))}")
        if len(each.reasons) > _REASONS_SHOWN:
            lines.append(f"  and {len(each.reasons) - _REASONS_SHOWN} more reasons; --json lists all")
    return "\n".join([*lines, "", f"cache: {escaped(use.cache)}"])


def _source_use(units: Counter[tuple[str, ...]], sizes: Counter[tuple[str, ...]]) -> SourceUse:
    reasons = [Reason(units=units[why], bytes=sizes[why], why=why) for why in units if why != _REUSED]
    return SourceUse(
        reused=Amount(units=units[_REUSED], bytes=sizes[_REUSED]),
        to_tokenize=Amount(units=sum(each.units for each in reasons), bytes=sum(each.bytes for each in reasons)),
        reasons=tuple(sorted(reasons, key=lambda each: (-each.bytes, each.why))),
    )


class _Stored:
    """The stored units that are near to some that are missing: of the same file, or of the same content.

    Of many that differ from a missing one in the same way only one is kept.
    """

    def __init__(self, places: Places, missing: NDArray[np.int64]) -> None:
        files, units = places.inputs.files, places.inputs.units
        contents = np.sort(np.fromiter((units[number].content for number in map(int, missing)), "S32", len(missing)))
        self._by_file: dict[str, dict[str, Origin]] = {full_name_of(file): {} for file in files}
        self._by_content: dict[str, dict[str, Origin]] = {}
        for folder in unit_folders(places.folders[0].parent) if len(missing) else ():
            if (origin := origin_of(folder)) is not None:
                kind = repr([_settings(origin), origin.facts["tokenizer"], origin.file_sha256, origin.unit_size])
                self._by_file.get(origin.file, {})[kind] = origin
                content = str(origin.facts["content"])
                if contents[np.searchsorted(contents[:-1], content.encode())] == content.encode():
                    self._by_content.setdefault(content, {})[kind] = origin

    def why_not(self, wanted: Origin) -> tuple[str, ...]:
        """The differences from the nearest."""
        of_content = self._by_content.get(wanted.facts["content"], {})
        near = [*of_content.values(), *self._by_file[wanted.file].values()]
        found = [differences(stored, wanted) for stored in near]
        return min(found, key=lambda each: (len(each), each), default=_NEVER_SEEN) or _NOT_THERE


def _differences(old: Origin, new: Origin) -> Iterator[str]:
    before, after = _settings(old), _settings(new)
    yield from _tokenizer_differences(old, new)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}"
    yield from _input_differences(old, new)


def _short(value: object) -> str:
    """A setting as it is told; of a long one, such as a template, its hash."""
    text = repr(value)
    return text if len(text) <= 60 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _input_differences(old: Origin, new: Origin) -> Iterator[str]:
    if old.facts["content"] == new.facts["content"]:
        if old.facts["range"] != new.facts["range"]:
            yield "range: the same bytes were elsewhere in the file"
        return
    if old.file_sha256 != new.file_sha256:
        yield f"content of {new.file} changed"
    if old.unit_size != new.unit_size:
        yield f"unit_size: {old.unit_size} -> {new.unit_size}"


def _tokenizer_differences(old: Origin, new: Origin) -> Iterator[str]:
    (before, *ids_before), (after, *ids_after) = old.facts["tokenizer"], new.facts["tokenizer"]
    if before != after:
        names = old.tokenizer if old.tokenizer == new.tokenizer else f"{old.tokenizer} -> {new.tokenizer}"
        yield f"tokenizer {names} (digest {before[:12]} -> {after[:12]})"
        return
    for role, was, is_now in zip(("bos_id", "eos_id"), ids_before, ids_after, strict=True):
        if was != is_now:
            yield f"{role}: {was} -> {is_now}"


def _settings(origin: Origin) -> dict[str, object]:
    """The facts by the names that users know, in one level; without tokenizer, content and range."""
    facts = {key: value for key, value in origin.facts.items() if key not in ("content", "range", "tokenizer")}
    version, *groups = (facts.pop(key) for key in ("version", "reading", "settings"))
    return {"TOKENIZATION_VERSION": version, **facts, **groups[0], **groups[1]}
