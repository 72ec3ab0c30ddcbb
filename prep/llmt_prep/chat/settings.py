"""What a mix says of its chats, source by source: the template's text, and the format that its first records show."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, takewhile
from typing import Any

from llmt_prep import documents
from llmt_prep.chat.formats import FORMATS, detect, reader
from llmt_prep.chat.lint import require_usable
from llmt_prep.chat.prepare import ChatSettings
from llmt_prep.chat.template import load_template
from llmt_prep.config import MixConfig
from llmt_prep.control import control_string_finder
from llmt_prep.documents import Reading, Row
from llmt_prep.fetching import at_hand
from llmt_prep.inputs import InputFile, Inputs, InputUnit, reading_of
from llmt_prep.tokenizer import LoadedTokenizer, digest_of
from llmt_shared.errors import ConfigError

_RECORDS = 64
"""Records that tell a source's format."""
_TEMPLATE_FILE = "chat_template.jinja"
_OWN_TEMPLATES = "additional_chat_templates/"


def with_template(said: str, tokenizer: LoadedTokenizer) -> LoadedTokenizer:
    """Return the tokenizer with the template that a mix names for its own.

    A dataset carries its tokenizer: so it says how its chats were rendered, and a trained model is exported with the
    template that it learned.

    Raises:
        ConfigError: there is no such template, or it gives no clean targets; text never becomes BOS or EOS.
    """
    _require_ends(tokenizer)
    template = load_template(said, tokenizer)
    require_usable(template)
    if said == "auto":
        return tokenizer
    others = {name: content for name, content in tokenizer.files.items() if not name.startswith(_OWN_TEMPLATES)}
    files = dict(sorted({**others, _TEMPLATE_FILE: template.source.encode()}.items()))
    return replace(tokenizer, files=files, digest=digest_of(files))


def _require_ends(tokenizer: LoadedTokenizer) -> None:
    """A model whose template spells its end token in letters would never learn to stop."""
    backend = tokenizer.backend
    backend.encode_special_tokens = False
    for role, token_id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        token = None if token_id is None else backend.id_to_token(token_id)
        if token is not None and token_id not in backend.encode(token, add_special_tokens=False).ids:
            raise ConfigError(
                f"tokenizer: its {role} token {token!r} is in the vocabulary, but no added token: text never becomes "
                f"it; save the tokenizer again with transformers, which adds the tokens that are named, or name another"
            )


def with_formats(config: MixConfig, inputs: Inputs) -> MixConfig:
    """Return the mix with the format of every source said.

    Raises:
        ConfigError: a source's format cannot be told by its first records.
    """
    sources = {
        name: said.model_copy(update={"format": _format(config, inputs, number, name)})
        for number, (name, said) in enumerate(config.sources.items())
    }
    return config.model_copy(update={"sources": sources})


def chat_settings(config: MixConfig, tokenizer: LoadedTokenizer) -> list[ChatSettings]:
    """Return what makes text and targets of each source's records.

    Args:
        config: a mix of chats or pairs, with its formats said.
        tokenizer: the template is its own.
    """
    assert config.kind != "pretrain", "of chats and pairs"
    template = load_template("auto", tokenizer)
    _check_system(config, tokenizer)
    refused = [fault for fault, said in config.pairs.model_dump().items() if said == "error"]
    refused += ["without_targets"] if config.chat.without_targets == "error" else []
    return [
        ChatSettings(
            kind=config.kind,
            format=said.format,
            fields=tuple(sorted(said.fields.items())),
            template=template.source,
            tools_template=template.for_tools.source if template.for_tools else None,
            train_on=config.chat.train_on if config.kind == "sft" else "assistant",
            system=config.chat.system,
            system_rate=config.chat.system_rate,
            special_tokens_in_text=config.special_tokens_in_text,
            refused=tuple(refused),
        )
        for said in config.sources.values()
    ]


def _check_system(config: MixConfig, tokenizer: LoadedTokenizer) -> None:
    found = control_string_finder(tokenizer.control_tokens)(config.chat.system or "")
    if found is not None and config.special_tokens_in_text != "keep":
        raise ConfigError(f"chat.system: holds the control string {found!r}; write it without")


def _format(config: MixConfig, inputs: Inputs, source: int, name: str) -> str:
    said = config.sources[name]
    assert config.kind != "pretrain", "of chats and pairs"
    try:
        if said.format != "auto":
            _check_format(said.format, config.kind)
            reader(said.format, said.fields)  # knows the names of its fields
            return said.format
        return detect(_first_records(config, inputs, source), config.kind, said.fields)
    except ConfigError as error:
        raise ConfigError(f"sources.{name}: {error}") from None


def _check_format(name: str, kind: str) -> None:
    if FORMATS[name].kind != kind:
        fitting = ", ".join(each for each, found in FORMATS.items() if found.kind == kind)
        raise ConfigError(f"format {name} is of {FORMATS[name].kind} data, and this mix is {kind}; wanted {fitting}")


def _first_records(config: MixConfig, inputs: Inputs, source: int) -> Sequence[dict[str, Any]]:
    reading = reading_of(config, list(config.sources.values())[source])
    first = bisect_left(inputs.units, source, key=lambda each: inputs.files[each.file].source)
    later = (inputs.units[number] for number in range(first, len(inputs.units)))
    mine = takewhile(lambda each: inputs.files[each.file].source == source, later)
    rows = chain.from_iterable(_rows(each, inputs.files[each.file], reading) for each in mine)
    return [row.value for row in islice(rows, _RECORDS)]


def _rows(each: InputUnit, file: InputFile, reading: Reading) -> Iterator[Row]:
    with at_hand(each.unit, each.content, file) as unit:
        yield from (item for item in documents.read(unit, reading) if isinstance(item, Row))
