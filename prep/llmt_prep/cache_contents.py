"""What a cache holds, and making it smaller: the answers of `llmt-prep cache list` and `llmt-prep cache prune`."""

import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from llmt_prep.cache import Origin, being_pruned, check_is_cache, origin_of, unit_folders
from llmt_prep.guard import inexact_engines
from llmt_prep.report import count, size, table
from llmt_prep.store import is_abandoned, remove_unit
from llmt_shared.config import StrictModel, parse_bytes
from llmt_shared.errors import ConfigError
from llmt_shared.terminal import escaped

_DAY = 86_400
_SECONDS = {"m": 60, "h": 3600, "d": _DAY, "w": 7 * _DAY}
_AGES = {"last day": 1, "last 7 days": 7, "last 30 days": 30, "last 90 days": 90}
"""Days since a unit was last used."""
_FILES_SHOWN = 20
_LONGEST_WRITE = _DAY
"""Seconds after which a unit that is still being written was left behind, whoever wrote it."""
_NO_ORIGIN = "unknown: written by an older version"


class StoredUnit(NamedTuple):
    """One unit of the cache."""

    path: Path
    bytes: int
    used: float
    """Seconds since 1970 when it was made or last reused."""


class Part(StrictModel):
    """Units that have something in common."""

    name: str
    units: int
    bytes: int
    last_used: str
    """ISO 8601, local time."""


class CacheContents(StrictModel):
    """What a cache holds, by three criteria; each part but the ages is sorted by size."""

    cache: str
    units: int
    bytes: int
    leftovers: int
    """Units that killed runs did not finish; `prune` removes them."""
    tokenizers: tuple[Part, ...]
    files: tuple[Part, ...]
    ages: tuple[Part, ...]


class Pruned(StrictModel):
    """What was removed, or would be."""

    cache: str
    dry_run: bool
    removed_units: int
    removed_bytes: int
    kept_units: int
    kept_bytes: int
    leftovers: int
    tokenizers: int
    """Folders of tokenizers that no unit that stays was made with."""


def cache_contents(cache: Path) -> CacheContents:
    """Count and measure what a cache holds.

    Raises:
        ConfigError: the folder is no cache.
    """
    check_is_cache(cache)
    units = list(_stored_units(cache))
    origins = {unit.path: origin_of(unit.path) for unit in units}
    return CacheContents(
        cache=str(cache),
        units=len(units),
        bytes=sum(unit.bytes for unit in units),
        leftovers=len(list(_leftovers(cache))),
        tokenizers=_by_size(_parts(units, lambda unit: _tokenizer_name(origins[unit.path]))),
        files=_by_size(_parts(units, lambda unit: origin.file if (origin := origins[unit.path]) else _NO_ORIGIN)),
        ages=_by_age(units),
    )


def prune(
    cache: Path,
    *,
    older_than: float | None = None,
    max_bytes: int | None = None,
    wanted: Collection[str] | None = None,
    dry_run: bool = False,
) -> Pruned:
    """Remove units, and always what killed runs left and tokenizers that no unit needs.

    Args:
        cache: the folder.
        older_than: seconds; units that were not used for longer go.
        max_bytes: then the least recently used go until the rest is no larger.
        wanted: keys of units; all others go.
        dry_run: remove nothing.

    Raises:
        ConfigError: the folder is no cache, or a run uses it.
    """
    check_is_cache(cache)
    with nullcontext() if dry_run else being_pruned(cache):
        units = list(_stored_units(cache))
        doomed = choose(units, time.time(), older_than, max_bytes, wanted)
        kept = sorted(set(units) - set(doomed))
        leftovers = list(_leftovers(cache))
        tokenizers = list(_unneeded_tokenizers(cache, kept))
        if not dry_run:
            _remove(doomed, [*leftovers, *tokenizers])
    return Pruned(
        cache=str(cache),
        dry_run=dry_run,
        removed_units=len(doomed),
        removed_bytes=sum(unit.bytes for unit in doomed),
        kept_units=len(kept),
        kept_bytes=sum(unit.bytes for unit in kept),
        leftovers=len(leftovers),
        tokenizers=len(tokenizers),
    )


def choose(
    units: Sequence[StoredUnit],
    now: float,
    older_than: float | None = None,
    max_bytes: int | None = None,
    wanted: Collection[str] | None = None,
) -> list[StoredUnit]:
    """Return which units go; the arguments are those of `prune`."""

    def is_doomed(unit: StoredUnit) -> bool:
        is_old = older_than is not None and now - unit.used > older_than
        return is_old or (wanted is not None and unit.path.name not in wanted)

    doomed = [unit for unit in units if is_doomed(unit)]
    rest = sorted(set(units) - set(doomed), key=lambda unit: (unit.used, unit.path))
    excess = sum(unit.bytes for unit in rest) - max_bytes if max_bytes is not None else 0
    for unit in rest:
        if excess <= 0:
            break
        doomed.append(unit)
        excess -= unit.bytes
    return doomed


def parse_age(text: str) -> float:
    """Read `30d`, `12h`, `2w` or `90m` as seconds.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([mhdw])\s*", text)
    if match is None:
        raise ConfigError(
            f"--older-than: found {text!r}; wanted minutes, hours, days or weeks, such as 90m, 12h, 30d or 2w"
        )
    return float(match[1]) * _SECONDS[match[2]]


def parse_size(text: str) -> int:
    """Read `200GB` as bytes.

    Raises:
        ConfigError: it is no size.
    """
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--max-size: {error}") from None


def render_contents(contents: CacheContents) -> str:
    """Return what a cache holds as text."""
    parts = [("tokenizer", contents.tokenizers), ("used in the", contents.ages), ("file", contents.files)]
    lines = [f"{escaped(contents.cache)}: {count(contents.units)} units, {size(contents.bytes)}"]
    lines += [f"{count(contents.leftovers)} left by killed runs; `cache prune` removes them"] * bool(contents.leftovers)
    for title, all_parts in parts:
        rows = [
            [escaped(part.name), count(part.units), size(part.bytes), part.last_used.replace("T", " ")]
            for part in all_parts[:_FILES_SHOWN]
        ]
        lines += ["", table([title, "units", "size", "last used"], rows)] if rows else []
        if len(all_parts) > _FILES_SHOWN:
            lines.append(f"and {count(len(all_parts) - _FILES_SHOWN)} smaller; --json lists all")
    return "\n".join(lines)


def render_pruned(pruned: Pruned) -> str:
    """Return what was removed as text."""
    verb = "would remove" if pruned.dry_run else "removed"
    return (
        f"{escaped(pruned.cache)}: {verb} {count(pruned.removed_units)} units, {size(pruned.removed_bytes)}; "
        f"{count(pruned.leftovers)} left by killed runs; {count(pruned.tokenizers)} tokenizers; "
        f"{count(pruned.kept_units)} units, {size(pruned.kept_bytes)} stay"
    )


def _stored_units(cache: Path) -> Iterator[StoredUnit]:
    for folder in unit_folders(cache):
        try:
            num_bytes = sum(path.stat().st_size for path in folder.iterdir())
            yield StoredUnit(folder, num_bytes, folder.stat().st_mtime)
        except FileNotFoundError:  # another process removes it
            continue


def _leftovers(cache: Path) -> Iterator[Path]:
    """Folders and files that were being written when a process ended."""
    for folder in cache.glob("units/*/.*.tmp"):
        with suppress(FileNotFoundError):  # a run has finished it
            if is_abandoned(folder) or time.time() - folder.stat().st_mtime > _LONGEST_WRITE:
                yield folder
    for pattern in ("*.tmp", "tokenizers/**/*.tmp"):
        yield from cache.glob(pattern)


def _unneeded_tokenizers(cache: Path, kept: Iterable[StoredUnit]) -> Iterator[Path]:
    origins = (origin_of(unit.path) for unit in kept)
    needed = {origin.facts["tokenizer"][0][:32] for origin in origins if origin}
    yield from (
        folder for folder in cache.glob("tokenizers/*") if folder.name not in needed and not inexact_engines(folder)
    )


def _remove(units: Iterable[StoredUnit], more: Iterable[Path]) -> None:
    for unit in units:
        remove_unit(unit.path)
    for path in more:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _tokenizer_name(origin: Origin | None) -> str:
    return f"{origin.tokenizer} (digest {origin.facts['tokenizer'][0][:12]})" if origin else _NO_ORIGIN


def _parts(units: Iterable[StoredUnit], name_of: Callable[[StoredUnit], str]) -> list[Part]:
    groups: dict[str, list[StoredUnit]] = {}
    for unit in units:
        groups.setdefault(name_of(unit), []).append(unit)
    return [
        Part(
            name=name,
            units=len(group),
            bytes=sum(unit.bytes for unit in group),
            last_used=datetime.fromtimestamp(max(unit.used for unit in group)).isoformat(timespec="minutes"),
        )
        for name, group in groups.items()
    ]


def _by_size(parts: Iterable[Part]) -> tuple[Part, ...]:
    return tuple(sorted(parts, key=lambda part: (-part.bytes, part.name)))


def _by_age(units: Iterable[StoredUnit]) -> tuple[Part, ...]:
    now, names = time.time(), [*_AGES, "time before"]

    def name_of(unit: StoredUnit) -> str:
        return next((name for name, days in _AGES.items() if now - unit.used <= days * _DAY), names[-1])

    return tuple(sorted(_parts(units, name_of), key=lambda part: names.index(part.name)))
