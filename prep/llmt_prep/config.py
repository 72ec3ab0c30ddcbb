"""What mix.yaml may say. `llmt-prep schema` prints it as JSON schema."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from llmt_prep.packing import CARRY, WINDOW, Overflow
from llmt_shared.config import Bytes, Count, StrictModel, UserLocation, UserPath, parse_count
from llmt_shared.objects import Location, ObjectPath, location_of


def _require_rows_with_targets(length: int) -> int:
    if length < 2:
        raise ValueError(f"a row of {length} token has no target: a segment's first token is never one; wanted >= 2")
    return length


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _source_path(text: str) -> str:
    location = location_of(text)
    return str(location) if isinstance(location, ObjectPath) or text.lower().startswith("file://") else text


def _output(location: Location) -> Location:
    if isinstance(location, ObjectPath) and not location.can_list:
        raise ValueError(
            f"found {location.url!r}; a web server takes no datasets: wanted a path, or a URL such as s3://"
        )
    return location


def _as_tokenizer(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _budget(value: object) -> object:
    return value if value in (None, "max") else parse_count(value)


def _max_bad(value: object) -> object:
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9.]+)\s*%", value.strip())):
        if float(match[1]) > 100:
            raise ValueError(f"found {value!r}; wanted a share of at most 100%")
        return f"{float(match[1]):g}%"
    return parse_count(value)


def _name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"source name {name!r}; wanted letters, digits, '_', '-' and '.'")
    return name


def _share(value: object) -> object:
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9.]+)\s*%\s*", value)):
        return float(match[1]) / 100
    return value


Kind = Literal["pretrain", "sft", "preference"]
Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "explicit", "implicit", "transcript"]
_OVERFLOWS: dict[str, tuple[Overflow, ...]] = {
    "pretrain": ("split", "truncate", "drop", "error"),
    "sft": ("drop", "truncate", "error"),
    "preference": ("drop", "truncate_prompt", "error"),
}
"""What `sequence.overflow` may say; first what it says where it is left out."""

Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=1)]


class TokenizerConfig(StrictModel):
    """A tokenizer and what its files leave out."""

    path: str
    """Folder with a `tokenizer.json`, that file itself, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit that it names is pinned in the dataset."""
    bos_token: str | None = None
    """Replaces what tokenizer_config.json says."""
    eos_token: str | None = None
    """Replaces what tokenizer_config.json says."""


class SequenceConfig(StrictModel):
    """Rows and what happens to documents longer than one."""

    length: Annotated[Count, AfterValidator(_require_rows_with_targets), Field(lt=2**31)]
    """L: tokens of a row."""
    overflow: Overflow = "split"
    """`split` (text only, and its default) cuts into the fewest pieces; `drop` (the default of chats and pairs) leaves
    the document out; `truncate` (text and chats) keeps the first L tokens; `truncate_prompt` (pairs) takes equally many
    tokens from the left of both prompts."""


class HoldoutConfig(StrictModel):
    """Documents set apart for validation, chosen by a hash of their text: duplicates fall on one side."""

    fraction: Annotated[Share, Field(lt=1)] = 0.0
    """Share of the documents, such as 0.001 or 0.1%; 0 holds out none."""


class ChatConfig(StrictModel):
    """How conversations become text, and which of it is trained on."""

    template: str = "auto"
    """`auto` takes the tokenizer's own; the name of a built-in one (such as chatml); a file; or the template itself."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """What the model learns to write: every assistant turn, the last one, or all of the text."""
    system: str | None = None
    """A system message for conversations that have none."""
    system_rate: Share = 1.0
    """To how many of them it is given; which ones, is a function of their messages."""
    without_targets: Literal["drop", "error"] = "drop"
    """What becomes of a conversation with nothing to train on."""


class PairsConfig(StrictModel):
    """What becomes of preference pairs that are well-formed and yet of no use; what is dropped is counted."""

    differing_prompts: Literal["drop", "error"] = "drop"
    identical_sides: Literal["drop", "error"] = "drop"
    empty_answer: Literal["drop", "error"] = "drop"


class PackingConfig(StrictModel):
    """How many documents are packed together, and which rows may stay short for the next window."""

    window: Annotated[Count, Field(ge=1)] = WINDOW
    """Documents of a packing window; memory grows with it."""
    carry: Annotated[float, Field(ge=0, le=1)] = CARRY
    """Rows less full than this give their documents to the next window; 0 carries nothing."""


class RayConfig(StrictModel):
    """The cluster of `executor: ray`."""

    address: str | None = None
    """HOST:PORT of its head, `auto` (one that runs on this machine), or `local` (one for this run alone); where nothing
    is said $RAY_ADDRESS, else one that runs on this machine, else `local`."""
    memory: Annotated[Bytes, Field(ge=1)] = 1_000_000_000
    """Set aside for each task on its node: as many tasks run there at a time as its memory and its CPUs have room
    for."""


class SourceConfig(StrictModel):
    """One corpus of the mixture."""

    path: Annotated[tuple[Annotated[str, AfterValidator(_source_path)], ...], BeforeValidator(_as_list)] = ()
    """Files, globs or folders, relative to the working directory, or their URLs, such as s3://bucket/raw/*.jsonl.zst;
    excludes `hf`."""
    hf: str | None = None
    """Hub id (or local folder) for `datasets.load_dataset`; excludes `path`."""
    name: str | None = None
    """Configuration name of an `hf` dataset."""
    split: str = "train"
    """Split of an `hf` dataset."""
    revision: str | None = None
    """Branch, tag or commit of an `hf` dataset."""
    reader: Literal["auto", "jsonl", "parquet", "arrow", "text"] = "auto"
    """`auto` goes by the file's suffix."""
    text_field: str = "text"
    """Field or column that holds the text."""
    format: Format = "auto"
    """What the records of a chat or preference source are; `auto` looks at the first of them."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Where a record's fields have other names than their format's: wanted name -> name in the record."""
    record: Literal["file", "line", "paragraph"] = "file"
    """What one document is in a plain-text file."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Share of the budget's tokens, relative to the other weighted sources; excludes `epochs` and `tokens`."""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Passes over the documents, such as 0.5 or 2; the default, where nothing is said, is 1."""
    tokens: Annotated[Count, Field(ge=1)] | None = None
    """Tokens that land in rows."""

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterable[str]:
        """Amounts that exclude each other, and files that are named twice or not at all."""
        said = [key for key in ("weight", "epochs", "tokens") if given.get(key) is not None]
        if len(said) > 1:
            yield f"says {' and '.join(said)}; a source takes one of weight, epochs and tokens"
        if bool(given.get("path")) == bool(given.get("hf")):
            yield "wanted exactly one of `path` (files) and `hf` (a Hugging Face dataset)"


class MixConfig(StrictModel):
    """The whole of mix.yaml."""

    kind: Kind = "pretrain"
    output: Annotated[UserLocation, AfterValidator(_output)]
    """Directory to make; it is written beside its final name and renamed when finished. Or a URL, such as
    s3://bucket/pt8k, below which there is nothing yet."""
    tokenizer: Annotated[TokenizerConfig, BeforeValidator(_as_tokenizer)]
    """Folder with a `tokenizer.json`, that file itself, a hub id, or a mapping with `path` and more."""
    sequence: SequenceConfig
    budget: Annotated[int | Literal["max"] | None, BeforeValidator(_budget)] = None
    """Tokens of the training rows; `max` is the largest that respects `max_epochs`. Weights need a budget."""
    max_epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How often a weighted source may be seen before the plan stops."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Order of documents and rows."""
    holdout: HoldoutConfig = HoldoutConfig()
    bos: Literal["auto", "always", "never"] = "auto"
    """`auto` does as the tokenizer does; only a document's first piece has it."""
    eos: Literal["always", "never"] = "always"
    """Ends every document; only a document's last piece has it."""
    special_tokens_in_text: Literal["as_text", "error", "keep"] = "as_text"
    """What "<|endoftext|>" in a document becomes: plain text, an error, or the control token. A chat that holds such a
    string is quarantined under `as_text`: its text is one with the template's, whose strings must become tokens."""
    max_bad: Annotated[int | str, BeforeValidator(_max_bad)] = "1%"
    """Records of a source that may be unusable, as a number or a share, before the run stops."""
    max_record_bytes: Annotated[Bytes, Field(ge=1024)] = 134_217_728
    """A larger record (decompressed) is a bad one; a worker needs a few times this much memory for the largest."""
    chat: ChatConfig = ChatConfig()
    pairs: PairsConfig = PairsConfig()
    packing: PackingConfig = PackingConfig()
    shard_size: Annotated[Bytes, Field(ge=1)] = 256_000_000
    """Bytes of tokens in one file, about."""
    unit_size: Annotated[Bytes, Field(ge=1)] = 16_000_000
    """Bytes of input that one task reads, about. The dataset does not depend on it."""
    cache: UserPath | None = None
    """Directory of tokenized input; by default `.llmt-cache` beside the output, or in the working directory where that
    is a URL. The dataset does not depend on it."""
    engine: Literal["auto", "tokenizers", "fastokens"] = "auto"
    """`tokenizers` is the reference; `fastokens` is some fifty times faster and guarded by it; `auto` takes it where it
    serves the tokenizer. The dataset does not depend on it."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Tasks that run at a time; by default one for each CPU that this process may use, or that the cluster has. The
    dataset does not depend on it."""
    executor: Literal["local", "ray"] = "local"
    """Where tasks run: in processes of this machine, or on a Ray cluster. The dataset does not depend on it."""
    ray: RayConfig = RayConfig()
    sources: Annotated[
        dict[Annotated[str, AfterValidator(_name)], SourceConfig], Field(min_length=1, max_length=65_535)
    ]

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterable[str]:
        """Weights need a budget, and a budget needs weights."""
        sources = given.get("sources")
        sources = sources if isinstance(sources, Mapping) else {}
        weighted = [name for name, said in sources.items() if isinstance(said, Mapping) and said.get("weight")]
        if weighted and given.get("budget") is None:
            yield f"sources {', '.join(weighted)} have a weight, so `budget` is needed: such as 20B, or max"
        if given.get("budget") is not None and not weighted:
            yield "`budget` is shared by sources with a weight, and none has one; give weights or no budget"
        yield from _misplaced(given)

    @field_validator("sequence")
    @classmethod
    def _with_overflow(cls, sequence: SequenceConfig, info: ValidationInfo) -> SequenceConfig:
        """Fill in what the kind does with what is too long, where nothing is said."""
        if "overflow" in sequence.model_fields_set or "kind" not in info.data:
            return sequence
        return sequence.model_copy(update={"overflow": _OVERFLOWS[info.data["kind"]][0]})


_OF_TEXT = ("bos", "eos")
_OF_THE_RUN = ("output", "workers", "executor", "ray", "cache", "unit_size", "engine")
"""What the dataset does not depend on."""
_OF_CHATS = {"chat": ("sft", "preference"), "pairs": ("preference",)}


def _misplaced(given: Mapping[str, Any]) -> Iterable[str]:
    """Settings that this kind of dataset has no use for: ignored, they would mislead."""
    kind, sequence = given.get("kind", "pretrain"), given.get("sequence")
    allowed = _OVERFLOWS.get(kind, ())
    overflow = sequence.get("overflow") if isinstance(sequence, Mapping) else None
    if allowed and overflow is not None and overflow in get_args(Overflow) and overflow not in allowed:
        yield f"sequence.overflow: {overflow!r} is not for kind {kind}; wanted one of {', '.join(allowed)}"
    for key, kinds in _OF_CHATS.items():
        if key in given and allowed and kind not in kinds:
            yield f"`{key}` is for kind {' and '.join(kinds)}, and this is {kind}; set `kind`, or remove it"
    sources = given.get("sources")
    for name, source in sources.items() if isinstance(sources, Mapping) else ():
        unused = ("format", "fields") if kind == "pretrain" else ("text_field", "record")
        for key in unused if isinstance(source, Mapping) and allowed else ():
            if key in source:
                yield f"`sources.{name}.{key}` means nothing for kind {kind}; remove it, or set `kind`"
    for key in _OF_TEXT:
        if key in given and kind in ("sft", "preference"):
            yield f"`{key}` is for kind pretrain: how a conversation begins and ends is its template's; remove it"
    if kind == "preference" and isinstance(chat := given.get("chat"), Mapping) and "train_on" in chat:
        yield "`chat.train_on` is for kind sft: of a pair, what follows the prompt is trained on; remove it"


def tolerated(max_bad: int | str, records: int) -> float:
    """How many of ``records`` may be bad."""
    return max_bad if isinstance(max_bad, int) else float(max_bad.rstrip("%")) / 100 * records


def resolved(config: MixConfig, commits: dict[str, str], tokenizer_commit: str | None) -> dict[str, object]:
    """Return what of the mix the dataset depends on, with hub ids pinned to commits; it is stored with the dataset."""
    unused = {"pretrain": {"chat", "pairs"}, "sft": {"pairs", *_OF_TEXT}, "preference": {*_OF_TEXT}}[config.kind]
    mix = config.model_dump(mode="json", exclude={*_OF_THE_RUN, *unused})
    if config.kind == "preference":
        del mix["chat"]["train_on"]
    for source in mix["sources"].values():
        for key in ("format", "fields") if config.kind == "pretrain" else ("text_field", "record"):
            del source[key]
    if tokenizer_commit:
        mix["tokenizer"]["revision"] = tokenizer_commit
    for name, commit in commits.items():
        mix["sources"][name]["revision"] = commit
    return mix
