"""A BPE tokenizer with more tokens: a vocabulary's own, special ones, padding.

BPE makes a token only where merges lead to it. So the encoding that a new token has so far is joined from the left, one
new merge at a time, each ranked after all others: the old merges do what they did, then the new ones go on. What such a
merge makes on the way is a token too, an intermediate. Text without the string of a new token or of an intermediate is
tokenized as before.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llmt_prep.bpe import Merges, join
from llmt_prep.report import count
from llmt_prep.tokenizer import BACKEND_FILE, LoadedTokenizer, load_tokenizer
from llmt_shared import durable
from llmt_shared.errors import ConfigError
from llmt_shared.terminal import escaped


@dataclass(frozen=True)
class Extended:
    """What came of extending a tokenizer; all in the order given, each once."""

    added: tuple[str, ...]
    """New tokens that merges now lead to."""
    already_there: tuple[str, ...]
    """New or special tokens that were one token before; nothing was done for them."""
    intermediates: tuple[str, ...]
    """What new merges make on the way, as the tokenizer spells it: new tokens, or old ones that now appear more often.
    Characters that the tokenizer did not know, and that new tokens need, are among them."""
    as_added_tokens: tuple[str, ...]
    """New tokens that are cut out of a text before it is tokenized, because no merge can make them."""
    special: tuple[str, ...]
    """New special tokens, with that for padding."""
    vocab_size: int
    """Number of tokens; ids may have holes."""
    max_id: int
    """The largest id; a model needs one more rows of embeddings than this."""


def extend_tokenizer(
    folder: str,
    new_tokens: Sequence[str],
    out: Path,
    pad_token: str | None = None,
    special_tokens: Sequence[str] = (),
    as_added_token: bool = False,
) -> Extended:
    """Write a tokenizer that makes one token of each new one; ids of old tokens stay, new ids follow the largest.

    A token is what its text is when it stands alone: a tokenizer that marks the beginning of a word makes a token of
    "word" that begins one. The files of slow tokenizers (vocab.json, merges.txt, tokenizer.model) are left behind:
    they know nothing of the new tokens.

    Args:
        folder: folder, tokenizer.json or hub id of a BPE tokenizer, byte-level or with marks for spaces.
        new_tokens: texts, each of which shall be one token.
        out: folder to make; it appears whole or not at all.
        pad_token: becomes the padding token, and a special token where it is none yet.
        special_tokens: become special tokens, with ids after all others.
        as_added_token: make added tokens of those that the tokenizer takes apart before BPE, or changes.

    Raises:
        ConfigError: no BPE tokenizer; ``out`` exists; a token that cannot be, and why.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already; name another folder, or remove it")
    old = load_tokenizer(folder)
    described = json.loads(old.files[BACKEND_FILE])
    _require_bpe(folder, described)
    special = list(dict.fromkeys([*special_tokens, *([] if pad_token is None else [pad_token])]))
    _require_sound(folder, old, new_tokens, special)
    texts = [text for text in dict.fromkeys(new_tokens) if not _is_token(old.backend, text)]
    pieces = {text: _piece(old.backend, text) for text in texts}
    taken_apart = [text for text, piece in pieces.items() if piece is None]
    if taken_apart and not as_added_token:
        raise ConfigError(
            f"{folder}: takes apart or changes {_some(taken_apart)} before BPE, so no merge can make one token of it; "
            f"leave it out, or use --as-added-token"
        )
    new_special = [token for token in special if old.backend.token_to_id(token) is None]
    new = {*texts, *new_special}
    intermediates = _grow(described["model"], [piece for piece in pieces.values() if piece is not None], old.max_id)
    entries = _add_tokens(described, taken_apart, new_special)
    files = _with_entries({**old.files, BACKEND_FILE: _dumped(described)}, entries, pad_token)
    written = _written(folder, files, out, old, texts)
    return Extended(
        added=tuple(text for text, piece in pieces.items() if piece is not None),
        already_there=tuple(dict.fromkeys(token for token in (*new_tokens, *special) if token not in new)),
        intermediates=tuple(intermediates),
        as_added_tokens=tuple(taken_apart),
        special=tuple(new_special),
        vocab_size=written.vocab_size,
        max_id=written.max_id,
    )


def render_extended(extended: Extended, out: Path, as_json: bool) -> str:
    """Return what `tokenizer extend` prints."""
    if as_json:
        return json.dumps({"path": str(out)} | asdict(extended), indent=1)
    added = f"{count(len(extended.added))} new by merges, {count(len(extended.as_added_tokens))} cut out of the text"
    others = f"{count(len(extended.special))} special, {count(len(extended.already_there))} were there already"
    lines = [
        f"{out}: {count(extended.vocab_size)} tokens, ids up to {count(extended.max_id)}",
        f"{added}, {others}",
    ]
    if extended.intermediates:
        some = escaped(", ".join(extended.intermediates[:12])) + (", .." if len(extended.intermediates) > 12 else "")
        lines.append(f"{count(len(extended.intermediates))} made on the way to them: {some}")
    return "\n".join(lines)


def read_tokens(path: Path) -> list[str]:
    """Read new tokens: UTF-8, one a line, spaces and all; empty lines are skipped.

    Raises:
        ConfigError: no such file, or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; wanted a file with one token a line") from None
    return [token for line in text.split("\n") if (token := line.removesuffix("\r"))]


def _require_bpe(folder: str, described: Mapping[str, Any]) -> None:
    model = described.get("model") or {}
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise ConfigError(f"{folder}: a {kind} tokenizer; wanted BPE, the only kind to which merges can be added")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ConfigError(f"{folder}: spells parts of words with {key} {model[key]!r}; wanted BPE without it")


def _require_sound(folder: str, old: LoadedTokenizer, new_tokens: Sequence[str], special: Sequence[str]) -> None:
    if not all((*new_tokens, *special)):
        raise ConfigError("a new token is empty; wanted at least one character")
    if both := sorted({*special} & {*new_tokens}):
        raise ConfigError(f"{_some(both)} is both a new token and a special one; wanted one of the two")
    added = {each.content for each in old.backend.get_added_tokens_decoder().values()}
    if ordinary := [token for token in special if token not in added and old.backend.token_to_id(token) is not None]:
        raise ConfigError(
            f"{folder}: {_some(ordinary)} is an ordinary token of text, which cannot become special; choose another"
        )


def _is_token(backend: Tokenizer, text: str) -> bool:
    ids = backend.encode(text, add_special_tokens=False).ids
    return len(ids) == 1 and backend.decode(ids, skip_special_tokens=False) == text


def _piece(backend: Tokenizer, text: str) -> str | None:
    """Return what BPE gets to see of a text, or ``None`` where that is not one string that stands for the text."""
    normalized = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    pieces = [normalized]
    if backend.pre_tokenizer is not None:
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]
    if len(pieces) != 1 or not pieces[0]:
        return None
    decoded = pieces[0] if backend.decoder is None else backend.decoder.decode(pieces)
    return pieces[0] if decoded == text else None


def _grow(model: dict[str, Any], pieces: Sequence[str], max_id: int) -> list[str]:
    """Add pieces, and the merges that lead to them, to a model; returns the intermediates."""
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    ordered = list(dict.fromkeys(reversed(pairs)))[::-1]  # of a pair that is there twice, the last rank counts
    merges: Merges = {(left, right): rank for rank, (left, right) in enumerate(ordered)}
    vocabulary, wanted = model["vocab"], set(pieces)
    made = [character for piece in pieces for character in piece if character not in vocabulary]
    made += [joined for piece in pieces for joined in join(piece, merges)]
    intermediates = [token for token in dict.fromkeys(made) if token not in wanted]
    _number(vocabulary, [*pieces, *intermediates], max_id + 1)
    model["merges"] = [list(pair) for pair in merges]
    return intermediates


def _add_tokens(described: dict[str, Any], plain: Sequence[str], special: Sequence[str]) -> list[dict[str, Any]]:
    """Append added tokens; returns their entries.

    All added tokens, old ones too, get their ids in the model's vocabulary as well: `tokenizers` numbers those that it
    does not find there anew, by the size of the vocabulary, which has grown.
    """
    vocabulary, added = described["model"]["vocab"], described.setdefault("added_tokens", [])
    vocabulary |= {each["content"]: each["id"] for each in added if each["content"] not in vocabulary}
    _number(vocabulary, [*plain, *special], max(vocabulary.values(), default=-1) + 1)
    entries = [
        {"id": vocabulary[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": is_special}
        for tokens, is_special in ((plain, False), (special, True)) for token in tokens
    ]  # fmt: skip
    added += entries
    return entries


def _number(vocabulary: dict[str, int], tokens: Iterable[str], first: int) -> None:
    for token in tokens:
        if token not in vocabulary:
            vocabulary[token] = first
            first += 1


def _with_entries(
    files: dict[str, bytes], entries: Sequence[Mapping[str, Any]], pad_token: str | None
) -> dict[str, bytes]:
    """The files with those beside tokenizer.json saying the same of added tokens and padding."""
    config = json.loads(files.get("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast"}'))
    named = json.loads(files.get("special_tokens_map.json", b"{}"))
    ids = json.loads(files.get("added_tokens.json", b"{}")) | {each["content"]: each["id"] for each in entries}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {
            str(each["id"]): {key: value for key, value in each.items() if key != "id"} for each in entries
        }
    if pad_token is not None:
        config["pad_token"] = named["pad_token"] = pad_token
    beside = {"special_tokens_map.json": named, "added_tokens.json": ids}
    told = {name: _dumped(content) for name, content in beside.items() if name in files}
    if "tokenizer_config.json" in files or pad_token is not None:
        told["tokenizer_config.json"] = _dumped(config)
    return {**files, **told}


def _written(
    folder: str, files: Mapping[str, bytes], out: Path, old: LoadedTokenizer, texts: Sequence[str]
) -> LoadedTokenizer:
    """Write the files beside their place, check the tokenizer that they are, and only then give them their name."""
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for name, content in files.items():
            durable.write(staging / name, content)
        new = load_tokenizer(str(staging))
        _check(folder, old, new, texts)
        with durable.naming(out):
            staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    durable.sync_directory(out.parent)
    return new


def _check(folder: str, old: LoadedTokenizer, new: LoadedTokenizer, texts: Sequence[str]) -> None:
    ids = new.backend.get_vocab(with_added_tokens=True)
    before = old.backend.get_vocab(with_added_tokens=True)
    if moved := [token for token, token_id in before.items() if ids.get(token) != token_id]:
        raise ConfigError(f"{folder}: `tokenizers` gives {_some(moved)} another id once there are more; upgrade it")
    if unmade := [text for text in texts if not _is_token(new.backend, text)]:
        raise ConfigError(f"{folder}: cannot make one token of {_some(unmade)} that reads the same; leave it out")
    if forged := [token for token in new.control_tokens if _is_forged(token, new) and not _is_forged(token, old)]:
        raise ConfigError(
            f"{folder}: text that says {_some(forged)} would become the special token itself; "
            f"choose special tokens that the tokenizer takes apart, such as '<|pad|>'"
        )


def _is_forged(token: str, tokenizer: LoadedTokenizer) -> bool:
    """Whether plain text can become a special token: where BPE makes it, or looks whole words up in its vocabulary."""
    return tokenizer.backend.token_to_id(token) in _as_text(tokenizer.backend, token)


def _as_text(backend: Tokenizer, token: str) -> list[int]:
    backend.encode_special_tokens = True
    try:
        ids: list[int] = backend.encode(token, add_special_tokens=False).ids
        return ids
    finally:
        backend.encode_special_tokens = False


def _some(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - 8} more" if len(tokens) > 8 else ""
    return ", ".join(repr(token) for token in tokens[:8]) + more


def _dumped(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()
