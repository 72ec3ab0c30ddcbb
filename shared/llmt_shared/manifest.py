"""What a finished dataset says of itself: MANIFEST.json, its digest, and the check that every file is there.

The manifest is written last, so a directory without one is unfinished. It lists every file that the dataset's
identity covers; `run.json` (what is true of one run only) is not among them.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import AfterValidator, ValidationError

from llmt_shared.config import StrictModel
from llmt_shared.errors import FormatError
from llmt_shared.objects import Location, ObjectPath

FORMAT_VERSION = 1
NAME = "MANIFEST.json"
NOTE = "PACKING.json"
"""Below a URL: who makes the dataset, of what, as long as it is unfinished."""


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise ValueError(f"path {path!r} leaves the dataset's directory")
    return path


def _known_splits(splits: "dict[str, SplitEntry]") -> "dict[str, SplitEntry]":
    if "train" not in splits or not splits.keys() <= {"train", "validation"}:
        raise ValueError(f"splits {', '.join(splits)}; wanted train, and validation where something is held out")
    return splits


class FileEntry(StrictModel):
    """One file of the dataset."""

    path: Annotated[str, AfterValidator(_inside)]
    """POSIX path relative to the dataset's directory, never outside it."""
    bytes: Annotated[int, Ge(0)]
    sha256: str


class TokenizerEntry(StrictModel):
    """What training must know of the tokenizer without loading it."""

    digest: str
    """sha256 over the names and bytes of the files in `tokenizer/`."""
    vocab_size: int
    max_id: int
    """Largest token id that the tokenizer can produce."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


class SplitEntry(StrictModel):
    """Sizes of one split."""

    rows: int
    segments: int
    tokens: int
    """Real tokens, without padding."""
    targets: int
    spans: int = 0
    """Runs of targets, of chats and pairs; 0 for text, whose every token is one."""
    pairs: int = 0
    """0 but for preference data."""


class Manifest(StrictModel):
    """The whole of MANIFEST.json."""

    format: Literal[1]
    kind: Literal["pretrain", "sft", "preference"]
    length: int
    """L: tokens of a row."""
    sources: tuple[str, ...]
    """Names; `segment_source` holds indices into them."""
    tokenizer: TokenizerEntry
    recipe: str
    """sha256 of everything that the bytes depend on: mix, input contents, tokenizer, versions of our algorithms."""
    splits: Annotated[dict[str, SplitEntry], AfterValidator(_known_splits)]
    files: tuple[FileEntry, ...]


def read_manifest(directory: Location) -> tuple[Manifest, str]:
    """Return the manifest and the dataset digest (sha256 of the manifest file's bytes).

    Raises:
        FormatError: no manifest, or one that is not of this format.
    """
    path = directory / NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FormatError(_why_missing(directory, error)) from None
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FormatError(
            f"{path}: {key}: {first['msg']}; wanted a manifest of format {FORMAT_VERSION}. "
            f"It was written by another version of llmt or damaged: pack again"
        ) from None
    return manifest, hashlib.sha256(content).hexdigest()


def _why_missing(directory: Location, error: OSError) -> str:
    if isinstance(directory, ObjectPath):
        if (directory / NOTE).exists():
            return f"{directory}: unfinished; run the same `llmt-prep pack` again to finish it"
        return f"{directory}: no dataset ({NAME}: {error.strerror}); wanted the `output` of `llmt-prep pack`"
    if (directory.parent / f"{directory.name}.staging").exists():
        return f"{directory}: unfinished; run the same `llmt-prep pack` again to finish it"
    if not directory.exists():
        return f"{directory}: no such dataset; `llmt-prep pack --mix mix.yaml` makes one"
    return f"{directory}: holds no {NAME}, so it is no finished dataset; wanted the `output` of `llmt-prep pack`"


def wrong_files(directory: Location, manifest: Manifest) -> list[str]:
    """Names and sizes compared with the disk or store: one line for each missing, truncated or oversized file."""
    if isinstance(directory, ObjectPath) and not directory.can_list:
        return []  # sizes are compared when files are read
    problems = []
    sizes = _listed_sizes(directory) if isinstance(directory, ObjectPath) else None
    for entry in manifest.files:
        path = directory / entry.path
        size = _size_on_disk(path) if isinstance(path, Path) else (sizes or {}).get(path)
        if size is None:
            problems.append(f"{path}: missing; the manifest lists it with {entry.bytes} bytes")
        elif size != entry.bytes:
            kind = "truncated" if size < entry.bytes else "oversized"
            problems.append(f"{path}: {kind}: {size} bytes; the manifest says {entry.bytes}")
    return problems


def refuse_wrong_files(problems: Sequence[str]) -> None:
    """Raise FormatError where there are problems."""
    if problems:
        more = f"\n({len(problems) - 5} more)" if len(problems) > 5 else ""
        raise FormatError("\n".join(problems[:5]) + more + "\nCopy the dataset again or pack it again")


def _size_on_disk(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _listed_sizes(directory: ObjectPath) -> dict[ObjectPath, int]:
    return {each.path: each.stat.st_size for each in directory.files()}
