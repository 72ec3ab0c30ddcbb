"""Which files a source means: paths, globs, folders, folders saved by `datasets`."""

import glob
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmt_prep.documents.record import Reading
from llmt_shared.errors import ConfigError

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow",
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text",
}  # fmt: skip
"""Reader of each known suffix."""

COMPRESSIONS = (".gz", ".zst")
_LINE_READERS = ("jsonl", "text")


def find_files(patterns: Sequence[str], reading: Reading) -> list[Path]:
    """Return the files that the patterns mean, sorted and each once: also where a link leads back to its own folder.

    A pattern is a file, a glob (``**`` is recursive), a folder (its files of known suffixes at any depth, without
    hidden ones) or a folder that ``datasets`` saved. With a reader given, a folder is searched for that reader's
    suffixes only.

    Raises:
        ConfigError: a pattern matches nothing, or names a file whose suffix says nothing while the reader is `auto`.
    """
    found = {os.path.normpath(path) for pattern in patterns for path in _match(os.path.expanduser(pattern), reading)}
    folders = {folder: os.path.realpath(folder) for folder in map(os.path.dirname, found)}
    unique: dict[tuple[str, str], str] = {}
    for path in sorted(found, key=lambda path: (path.count(os.sep), path)):  # of several ways, the shortest
        unique.setdefault((folders[os.path.dirname(path)], os.path.basename(path)), path)
    return [Path(path) for path in sorted(unique.values())]


def reader_for(path: str, reader: str) -> str:
    """Return the reader of a file: the one given, or, for ``auto``, that of its suffix.

    Raises:
        ConfigError: ``auto``, and the suffix says nothing.
    """
    if reader != "auto":
        return reader
    by_suffix = _reader_by_suffix(path)
    if by_suffix is None:
        raise ConfigError(
            f"{path}: the suffix {Path(path).suffix!r} does not say how to read it (known: {_known('auto')}); "
            f"set `reader:` to jsonl, parquet, arrow or text"
        )
    return by_suffix


def compression(path: str) -> str:
    """Return ``.gz``, ``.zst`` or, for a file stored plainly, nothing."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def require_records(path: str, reading: Reading) -> None:
    """Raise ConfigError where chats are to be read from what is only text, or the suffix says nothing."""
    if reader_for(path, reading.reader) == "text" and reading.text_field is None:
        raise ConfigError(f"{path}: text, and chats are read from JSON lines, Parquet or Arrow; leave it out")


def is_wanted(path: str, reading: Reading) -> bool:
    """Whether a file of a folder is read; where records are read whole, its texts (a README, say) are not."""
    by_suffix = _reader_by_suffix(path)
    if by_suffix is None or (by_suffix == "text" and reading.text_field is None):
        return False
    return reading.reader in ("auto", by_suffix)


def nothing_wanted(folder: str, anything: str, reading: Reading) -> ConfigError:
    """Return what to say of a folder without a file to read; ``anything`` is a glob of all its files."""
    return ConfigError(
        f"{folder}: no file below this folder ends in {_known(reading.reader)}; "
        f"for other names give a glob, such as {anything}, and `reader:`"
    )


def _match(pattern: str, reading: Reading) -> Iterable[str]:
    if os.path.isdir(pattern):
        return _folder(pattern, reading)
    files = [pattern] if os.path.exists(pattern) else _glob(pattern)
    for path in files:
        require_records(path, reading)
    return files


def _require_readable(folder: str) -> None:
    """`glob` leaves out what it may not read, and the documents in it would be missing without a word."""

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}; mend it, or leave it out of `path:`")

    for _ in os.walk(folder, onerror=refuse):
        pass


def _glob(pattern: str) -> list[str]:
    if glob.has_magic(os.path.dirname(pattern)):
        parts = Path(pattern).parts
        fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        _require_readable(os.path.join("", *parts[:fixed]) or ".")
    matches = glob.glob(pattern, recursive=True)
    files = [match for match in matches if not os.path.isdir(match)]
    if files:
        return files
    if matches:
        raise ConfigError(f"{pattern}: matches only folders; wanted files: write {os.path.join(pattern, '**', '*')}")
    is_glob = glob.has_magic(pattern)
    raise ConfigError(f"{pattern}: {'matches no file' if is_glob else 'no such file or folder'}; mend `path:`")


def _folder(folder: str, reading: Reading) -> list[str]:
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        splits = _json(os.path.join(folder, "dataset_dict.json")).get("splits", [])
        options = ", ".join(os.path.join(folder, split) for split in splits)
        raise ConfigError(f"{folder}: holds the splits of a saved dataset; point `path:` at one of {options}")
    if _is_saved_dataset(folder):
        return _saved_dataset(folder)
    _require_readable(folder)
    everything = glob.iglob(os.path.join(glob.escape(folder), "**", "*"), recursive=True)
    # a link that leads nowhere is kept, so that it is noticed when it is opened
    files = [path for path in everything if is_wanted(path, reading) and not os.path.isdir(path)]
    if not files:
        raise nothing_wanted(folder, os.path.join(folder, "**", "*.dat"), reading)
    saved = [parent for parent in sorted({os.path.dirname(path) for path in files}) if _is_saved_dataset(parent)]
    if saved:  # its folder also holds cached results of `.map`, and a neighbour may be another split
        raise ConfigError(f"{folder}: holds saved datasets deeper down; point `path:` at each, such as {saved[0]}")
    return files


def _is_saved_dataset(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "state.json"))


def _saved_dataset(folder: str) -> list[str]:
    state = _json(os.path.join(folder, "state.json"))
    if state.get("_indices_data_files"):
        raise ConfigError(f"{folder}: saved with an index over its rows; save it again after `.flatten_indices()`")
    files = [os.path.join(folder, each["filename"]) for each in state.get("_data_files", [])]
    missing = [path for path in files if not os.path.exists(path)]
    if missing or not files:
        what = f"{missing[0]} is missing" if missing else "state.json names no data files"
        raise ConfigError(f"{folder}: not a whole saved dataset: {what}; save it again with `.save_to_disk()`")
    return files


def _json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); save the dataset again with `.save_to_disk()`") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a JSON object; save the dataset again with `.save_to_disk()`")
    return content


def _reader_by_suffix(path: str) -> str | None:
    name = Path(path).name.lower()
    plain = name.removesuffix(compression(name))
    reader = FORMATS.get(Path(plain).suffix)
    return reader if plain == name or reader in _LINE_READERS else None


def _known(reader: str) -> str:
    suffixes = [suffix for suffix, name in FORMATS.items() if reader in ("auto", name)]
    compressed = " (also .gz, .zst)" if reader in ("auto", *_LINE_READERS) else ""
    return " ".join(suffixes) + compressed
