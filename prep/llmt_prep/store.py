"""The token store: what one unit of input becomes, a folder of raw arrays that appears whole or not at all.

Its files: `tokens`, `lengths`, `records` and `text_hash` (little-endian; see StoreUnit), of chats and pairs those of
`Targets`, `quarantine.jsonl` (bad records, one JSON object a line), `origin.json` (what the unit was made of) and
`meta.json` (UnitMeta, with a checksum of every other file).
"""

import errno
import glob
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmt_shared import durable
from llmt_shared.errors import FormatError

if TYPE_CHECKING:
    from llmt_prep.documents import BadRecord

TEXT_HASH_SALT = 0x6C6C6D74_74657874
"""Fixed for ever: which documents are held out depends on it."""

_COLUMNS: dict[str, np.dtype[Any]] = {
    "lengths": np.dtype("<u4"),
    "records": np.dtype("<u4"),
    "text_hash": np.dtype("<u8"),
}
_TARGET_COLUMNS: dict[str, np.dtype[Any]] = {
    "first_target": np.dtype("<u4"),
    "chosen_length": np.dtype("<u4"),
    "num_spans": np.dtype("<u4"),
}
_SPAN_COLUMNS: dict[str, np.dtype[Any]] = {"span_start": np.dtype("<u4"), "span_length": np.dtype("<u4")}
_QUARANTINE = "quarantine.jsonl"
_ORIGIN = "origin.json"
_META = "meta.json"
_WAY_OUT = "delete this folder and run the same command again"


class Targets(NamedTuple):
    """What may be trained on of D documents, which have S spans in all."""

    first_target: NDArray[np.integer]
    """[D]; tokens before the first target: of a pair, of the side that has fewer."""
    chosen_length: NDArray[np.integer]
    """[D]; of a pair, whose tokens are those of its chosen side and then of its rejected one; 0 of a conversation."""
    num_spans: NDArray[np.integer]
    """[D]"""
    span_start: NDArray[np.integer]
    """[S]; counted from the document's first token. Spans ascend, and none holds the first token of a side."""
    span_length: NDArray[np.integer]
    """[S]; at least 1."""


@dataclass(frozen=True)
class UnitMeta:
    """Counts of one unit: ``records = documents + empty + quarantined + left out``; see `LEFT_OUT`."""

    records: int
    documents: int
    empty: int
    """Records without a token: an empty text."""
    quarantined: int
    documents_with_control_strings: int
    tokens: int
    """BOS and EOS included."""
    text_bytes: int
    """UTF-8 bytes of the documents' texts."""
    lines: int
    """Physical lines or rows; blank lines are no records."""
    compared: int
    """Documents on which the fast engine was compared with the reference."""
    fallbacks: int
    """Batches that the fast engine failed on and the reference encoded."""
    engine: str
    """What tokenized it, with its version; the content does not depend on it."""
    dtype: str
    """uint16 or uint32."""
    checksums: dict[str, str]
    """xxh3_64 of each of the other files, by name."""
    has_targets: bool = False
    """Of chats and pairs; else every token is one, and the counts below are 0."""
    spans: int = 0
    target_tokens: int = 0
    turns: int = 0
    """Messages of the conversations, or of both sides of the pairs."""
    straddling: int = 0
    """Targets that begin before their span of the text or end behind it."""
    without_targets: int = 0
    differing_prompts: int = 0
    identical_sides: int = 0
    empty_answer: int = 0

    @property
    def content(self) -> str:
        """What tells this unit from one of the same name that another engine or run made."""
        return str(xxhash.xxh3_64_hexdigest(json.dumps(self.checksums, sort_keys=True).encode()))


COUNTED = tuple(field.name for field in fields(UnitMeta) if field.type is int)
"""The counts of `UnitMeta`."""

LEFT_OUT = ("without_targets", "differing_prompts", "identical_sides", "empty_answer")
"""Counts of records that are well-formed and yet nothing to train on."""


@dataclass(frozen=True)
class StoreUnit:
    """One unit; an array is mapped when it is first asked for."""

    path: Path
    meta: UnitMeta

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """[tokens] uint16 or uint32; document after document."""
        return _map(self.path / "tokens", np.dtype(self.meta.dtype).newbyteorder("<"))

    @cached_property
    def lengths(self) -> NDArray[np.uint32]:
        """[documents] tokens of each; never 0."""
        return _map(self.path / "lengths", _COLUMNS["lengths"])

    @cached_property
    def records(self) -> NDArray[np.uint32]:
        """[documents] physical line or row, from 0 at the unit's start; ascending."""
        return _map(self.path / "records", _COLUMNS["records"])

    @cached_property
    def text_hash(self) -> NDArray[np.uint64]:
        """[documents] hash of each raw text."""
        return _map(self.path / "text_hash", _COLUMNS["text_hash"])

    @cached_property
    def first_span(self) -> NDArray[np.int64]:
        """[documents + 1] where each document's spans begin; in memory."""
        counts = read_column(self.path, "num_spans", 0, self.meta.documents)
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @cached_property
    def span_start(self) -> NDArray[np.uint32]:
        """[spans] as in `Targets`."""
        return _map(self.path / "span_start", _SPAN_COLUMNS["span_start"])

    @cached_property
    def span_length(self) -> NDArray[np.uint32]:
        """[spans] as in `Targets`."""
        return _map(self.path / "span_length", _SPAN_COLUMNS["span_length"])

    @property
    def targets(self) -> Targets:
        """The targets of all documents; mapped anew each time, for a unit that stays open must hold few files."""
        columns = _TARGET_COLUMNS | _SPAN_COLUMNS
        return Targets(**{name: _map(self.path / name, dtype) for name, dtype in columns.items()})


def hash_text(text: bytes) -> int:
    """Return the 64-bit hash of a UTF-8 text by which duplicates are known and documents held out."""
    return xxhash.xxh3_64_intdigest(text, seed=TEXT_HASH_SALT)


def token_dtype(max_id: int) -> np.dtype[Any]:
    """Return the dtype of tokens on disk for a tokenizer's largest id."""
    return np.dtype("<u2" if max_id <= 65_535 else "<u4")


def unit_folder(folder: Path, key: str) -> Path:
    """Return where a unit lies below a folder of many: its name is its key."""
    return folder / key[:2] / key


def open_unit(path: Path) -> StoreUnit:
    """Open a unit; nothing is read but its counts.

    Raises:
        FormatError: no unit is there, or its files do not have the sizes that its counts ask for.
    """
    try:
        content = json.loads((path / _META).read_text("utf-8"))
        meta = UnitMeta(**content)
        sizes = {name: meta.documents * dtype.itemsize for name, dtype in _COLUMNS.items()}
        if meta.has_targets:
            sizes |= {name: meta.documents * dtype.itemsize for name, dtype in _TARGET_COLUMNS.items()}
            sizes |= {name: meta.spans * dtype.itemsize for name, dtype in _SPAN_COLUMNS.items()}
        sizes["tokens"] = meta.tokens * np.dtype(meta.dtype).itemsize
        wrong = [name for name, size in sizes.items() if (path / name).stat().st_size != size]
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError) as error:
        raise FormatError(f"{path}: not a unit of the token store: {error}; {_WAY_OUT}") from None
    if wrong:
        raise FormatError(f"{path / wrong[0]}: not of the {sizes[wrong[0]]} bytes that meta.json asks for; {_WAY_OUT}")
    return StoreUnit(path, meta)


def read_column(path: Path, name: str, first: int, count: int) -> NDArray[Any]:
    """Read ``count`` documents' part of a unit's `lengths`, `records`, `text_hash` or columns of `Targets`.

    Raises:
        FormatError: the file ends before.
    """
    out = np.empty(count, (_COLUMNS | _TARGET_COLUMNS)[name])
    with (path / name).open("rb") as file:
        file.seek(first * out.itemsize)
        if file.readinto(out.data) != out.nbytes:
            raise FormatError(f"{path / name}: ends before document {first + count}; {_WAY_OUT}")
    return out


def is_sound(path: Path) -> bool:
    """Whether a unit is there and its files still have the checksums that they were written with; reads all of it."""
    try:
        checksums = open_unit(path).meta.checksums
        return all(_checksum(path / name) == wanted for name, wanted in checksums.items())
    except (FormatError, FileNotFoundError):
        return False


def read_origin(path: Path) -> dict[str, Any]:
    """Return what a unit was made of; nothing where it does not say."""
    try:
        origin = json.loads((path / _ORIGIN).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return origin if isinstance(origin, dict) else {}


def read_quarantine(path: Path) -> "Iterator[BadRecord]":
    """Yield a unit's bad records in order."""
    from llmt_prep.documents import BadRecord  # loads pyarrow, which a worker that gathers can do without

    with (path / _QUARANTINE).open(encoding="utf-8") as lines:
        yield from (BadRecord(**json.loads(line)) for line in lines)


class UnitWriter:
    """Files of a unit that is being written; `writing_unit` gives one."""

    def __init__(self, directory: Path, dtype: np.dtype[Any], origin: Mapping[str, Any], has_targets: bool) -> None:
        self.meta: UnitMeta | None = None
        self._has_targets = has_targets
        self._dtypes = {"tokens": dtype, **_COLUMNS, **(_TARGET_COLUMNS | _SPAN_COLUMNS if has_targets else {})}
        self._files: dict[str, BinaryIO] = {
            name: (directory / name).open("wb") for name in [*self._dtypes, _QUARANTINE, _ORIGIN, _META]
        }
        self._hashes = {name: xxhash.xxh3_64() for name in [*self._dtypes, _QUARANTINE, _ORIGIN]}
        self._write(_ORIGIN, json.dumps(origin, indent=1).encode() + b"\n")

    def add(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[Any],
        records: Sequence[int] | NDArray[Any],
        text_hashes: Sequence[int] | NDArray[Any],
        targets: Targets | None = None,
    ) -> None:
        """Append documents: the ids of all of them one after another, and each one's length, record and text hash."""
        columns = {"tokens": tokens, "lengths": lengths, "records": records, "text_hash": text_hashes}
        for name, values in (columns | (targets._asdict() if targets else {})).items():
            self._write(name, np.ascontiguousarray(values, self._dtypes[name]).data)

    def quarantine(self, bad: "BadRecord") -> None:
        """Append a bad record."""
        self._write(_QUARANTINE, json.dumps(bad._asdict()).encode() + b"\n")

    def finish(self, counts: Mapping[str, int], engine: str) -> UnitMeta:
        """Say what the unit holds and what tokenized it; the last call, without which the unit never appears."""
        checksums = {name: state.hexdigest() for name, state in self._hashes.items()}
        dtype = self._dtypes["tokens"].name
        self.meta = UnitMeta(**counts, engine=engine, dtype=dtype, checksums=checksums, has_targets=self._has_targets)
        self._files[_META].write(json.dumps(asdict(self.meta), indent=1).encode() + b"\n")
        return self.meta

    def _write(self, name: str, content: bytes | memoryview) -> None:
        self._files[name].write(content)
        self._hashes[name].update(content)

    def close(self, sync: bool) -> None:
        """Close the files, after forcing them to the disk where asked."""
        for file in self._files.values():
            if sync:
                file.flush()
                os.fsync(file.fileno())
            file.close()


@contextmanager
def writing_unit(
    path: Path, dtype: np.dtype[Any], origin: Mapping[str, Any] | None = None, *, has_targets: bool = False
) -> Iterator[UnitWriter]:
    """Write a unit; the folder appears under its name when the block ends well, complete and on the disk.

    Where another process has made the same unit meanwhile, that one stays: its content is the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        writer = UnitWriter(temporary, dtype, origin or {}, has_targets)
        try:
            yield writer
        finally:
            writer.close(sync=writer.meta is not None)
        if writer.meta is None:
            raise ValueError(f"{path}: the unit was not finished")
        _publish(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails does not know where
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when all went well


def remove_unit(path: Path) -> None:
    """Remove a unit; a kill in the middle leaves none by its name, only what `is_abandoned`."""
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    with suppress(FileNotFoundError):  # another process was first
        path.rename(temporary)
        shutil.rmtree(temporary)


def is_abandoned(leftover: Path) -> bool:
    """Whether a unit that was being written or removed is of a process that runs no more, as far as one can know."""
    host, _, pid = leftover.name.removesuffix(".tmp").partition(".")[2].partition(".")[2].rpartition(".")
    is_ours = host == socket.gethostname() and pid.isdecimal()
    return is_ours and (int(pid) == os.getpid() or not is_running(int(pid)))


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _publish(temporary: Path, path: Path) -> None:
    durable.sync_directory(temporary)
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    durable.sync_directory(path.parent)


def _temporary(path: Path) -> Path:
    return durable.temporary_name(path.with_name(f".{path.name}"))


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine left of the same unit."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if is_abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def _checksum(path: Path) -> str:
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return str(state.hexdigest())


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
