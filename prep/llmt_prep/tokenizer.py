"""A tokenizer as its files describe it, without transformers: the fast backend, its control tokens, its files.

The files are kept byte for byte: a dataset carries them, so that training and export need nothing else.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llmt_shared.errors import ConfigError

BACKEND_FILE = "tokenizer.json"
FILE_PATTERNS = (
    BACKEND_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Files that make up a tokenizer; only the first must exist."""

_SLOW_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json", "merges.txt")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer ready to use, and what is known of it."""

    backend: Tokenizer
    """Truncation, padding and BPE dropout are off."""
    files: Mapping[str, bytes]
    """Name and content, sorted by name; as they were, but for tokens given in their place."""
    digest: str
    """sha256 over the names and contents of ``files``."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    """What the model makes of text that it does not know; ``None`` where it knows all."""
    adds_bos: bool
    """The tokenizer itself puts BOS before a text."""
    control_ids: frozenset[int]
    """Special added tokens, and BOS, EOS and padding; never the unknown token, which ordinary text may need."""
    control_tokens: tuple[str, ...]
    """Their strings, in the order of ids."""
    vocab_size: int
    """Number of tokens; ids may have holes."""
    max_id: int
    """The largest id that exists."""
    commit: str | None
    """Commit of a hub id; ``None`` for local files."""


def load_tokenizer(
    spec: str, revision: str | None = None, eos_token: str | None = None, bos_token: str | None = None
) -> LoadedTokenizer:
    """Load a tokenizer from a folder, a tokenizer.json or the Hugging Face Hub.

    Args:
        spec: folder, path of a ``tokenizer.json`` (its neighbours are read too) or of another ``.json`` file (read
            alone), or hub id.
        revision: branch, tag or commit of a hub id.
        eos_token: end-of-text token, which replaces what the files say.
        bos_token: begin-of-text token, which replaces what the files say.

    Raises:
        ConfigError: nothing there; only files of a slow tokenizer; broken files; a token that does not exist.
    """
    folder, commit = _locate(spec, revision)
    try:
        files = _read_alone(folder) if folder.is_file() else _read_folder(spec, folder)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}; mend it, or the `tokenizer`") from None
    described = _json(spec, BACKEND_FILE, files[BACKEND_FILE])
    backend = _backend(spec, files[BACKEND_FILE])
    given = {role: token for role, token in (("eos", eos_token), ("bos", bos_token)) if token is not None}
    for role, token in given.items():
        _require_token(spec, backend, role, token)
    files = _with_tokens(spec, files, given)
    ids = {role: backend.token_to_id(name) for role, name in _named_tokens(spec, files).items()}
    ids["unk"] = _unk_id(described.get("model") or {}, backend)
    control = _control_tokens(backend, ids)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return LoadedTokenizer(
        backend=backend,
        files=files,
        digest=digest_of(files),
        bos_id=ids.get("bos"),
        eos_id=ids.get("eos"),
        pad_id=ids.get("pad"),
        unk_id=ids.get("unk"),
        adds_bos=ids.get("bos") is not None and backend.encode("").ids[:1] == [ids["bos"]],
        control_ids=frozenset(control),
        control_tokens=tuple(control.values()),
        vocab_size=len(vocabulary),
        max_id=max(vocabulary.values(), default=-1),
        commit=commit,
    )


def _locate(spec: str, revision: str | None) -> tuple[Path, str | None]:
    path = Path(spec).expanduser()
    if path.exists():
        if revision is not None:
            raise ConfigError(f"{spec}: is a local path, which has no revision {revision!r}; leave `revision` out")
        return (path.parent if path.name == BACKEND_FILE else path), None
    if not _HUB_ID.fullmatch(spec) or path.suffix == ".json":
        raise ConfigError(f"{spec}: no such tokenizer; wanted a folder with tokenizer.json, that file, or a hub id")
    return _download(spec, revision)


def _download(repo_id: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILE_PATTERNS)))
    except Exception as error:  # of the hub, of HTTP and of the file system: which, depends on the hub's version
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{repo_id}: no such folder, and the hub does not give it: {reason}; mend the path or id, or, for a "
            f"private or gated repository, log in with `hf auth login`"
        ) from None
    return folder, folder.name  # the cache names a snapshot's folder by its commit


def _read_folder(spec: str, folder: Path) -> dict[str, bytes]:
    paths = [path for pattern in FILE_PATTERNS for path in folder.glob(pattern) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    if BACKEND_FILE in files:
        return dict(sorted(files.items()))
    slow = ", ".join(name for name in _SLOW_FILES if (folder / name).exists())
    found = f", but a slow tokenizer ({slow})" if slow else ""
    raise ConfigError(
        f"{spec}: no tokenizer.json in it{found}; wanted a fast tokenizer: convert a slow one once with transformers, "
        f"AutoTokenizer.from_pretrained({spec!r}).save_pretrained('FOLDER')"
    )


def _read_alone(path: Path) -> dict[str, bytes]:
    return {BACKEND_FILE: path.read_bytes()}


def _backend(spec: str, content: bytes) -> Tokenizer:
    try:
        backend = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            f"{spec}: tokenizer.json is not one that the `tokenizers` library can read: {error}; "
            f"save it again with the tokenizer's own library, or upgrade `tokenizers`"
        ) from None
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # else the same text has other tokens on every run
    return backend


def _named_tokens(spec: str, files: Mapping[str, bytes]) -> dict[str, str]:
    """Token strings by role (bos, eos, pad, unk); tokenizer_config.json wins where both files name one."""
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config = _json(spec, name, files.get(name, b"{}"))
        for role in ("bos", "eos", "pad", "unk"):
            token = config.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                named[role] = token
    return named


def _unk_id(model: Mapping[str, Any], backend: Tokenizer) -> int | None:
    """The id that the model itself gives to what it does not know.

    What the configuration calls it does not count: of many byte-level tokenizers, which know every text, it is EOS.
    """
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    if isinstance(model.get("unk_token"), str):
        unk_id: int | None = backend.token_to_id(model["unk_token"])
        return unk_id
    return None


def _require_token(spec: str, backend: Tokenizer, role: str, token: str) -> None:
    if backend.token_to_id(token) is None:
        special = [added.content for added in backend.get_added_tokens_decoder().values() if added.special]
        near = difflib.get_close_matches(token, special, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        known = f"; its special tokens: {', '.join(special[:12])}" if special else ""
        raise ConfigError(f"{spec}: {role}_token {token!r} is not in the vocabulary{hint}{known}")


def _with_tokens(spec: str, files: dict[str, bytes], given: Mapping[str, str]) -> dict[str, bytes]:
    """The files with tokenizer_config.json naming the given tokens: an exported model must end where training did."""
    named = _named_tokens(spec, files)
    if all(named.get(role) == token for role, token in given.items()):
        return files
    name = "tokenizer_config.json"
    config = _json(spec, name, files.get(name, b'{"tokenizer_class": "PreTrainedTokenizerFast"}'))
    config |= {f"{role}_token": token for role, token in given.items()}
    return dict(sorted({**files, name: json.dumps(config, indent=2, ensure_ascii=False).encode()}.items()))


def _control_tokens(backend: Tokenizer, ids: Mapping[str, int | None]) -> dict[int, str]:
    special = {token_id for token_id, added in backend.get_added_tokens_decoder().items() if added.special}
    special |= {token_id for role in ("bos", "eos", "pad") if (token_id := ids.get(role)) is not None}
    return {token_id: str(backend.id_to_token(token_id)) for token_id in sorted(special - {ids.get("unk")})}


def digest_of(files: Mapping[str, bytes]) -> str:
    """Return the sha256 over names and contents."""
    return hashlib.sha256(b"".join(_framed(files))).hexdigest()


def _framed(files: Mapping[str, bytes]) -> Iterator[bytes]:
    """Names and contents with their lengths, so that no two sets of files read the same."""
    for name, content in sorted(files.items()):
        for part in (name.encode(), content):
            yield len(part).to_bytes(8, "little") + part


def _json(spec: str, name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{spec}: {name} is not valid JSON: {error}; fetch or save the tokenizer again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{spec}: {name} is not a JSON object; fetch or save the tokenizer again")
    return value
