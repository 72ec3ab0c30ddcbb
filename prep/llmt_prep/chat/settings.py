"""What a mix says of its chats, source by source: the template's text, and the format that its first records show."""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

from llmt_prep import documents
from llmt_prep.chat.formats import detect, reader
from llmt_prep.chat.lint import require_usable
from llmt_prep.chat.prepare import ChatSettings
from llmt_prep.chat.template import load_template
from llmt_prep.config import MixConfig
from llmt_prep.documents import Row
from llmt_prep.inputs import Inputs, reading_of
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_shared.errors import ConfigError

_RECORDS = 64
"""Records that tell a source's format."""


def chat_settings(config: MixConfig, inputs: Inputs, tokenizer: LoadedTokenizer) -> list[ChatSettings]:
    """Return what makes text and targets of each source's records.

    Raises:
        ConfigError: the template gives no clean targets, or a source's format cannot be told.
    """
    template = load_template(config.chat.template, tokenizer)
    require_usable(template)
    assert config.kind != "pretrain", "of chats and pairs"
    refused = [fault for fault, said in config.pairs.model_dump().items() if said == "error"]
    refused += ["without_targets"] if config.chat.without_targets == "error" else []
    return [
        ChatSettings(
            kind=config.kind,
            format=_format(config, inputs, source),
            fields=tuple(sorted(said.fields.items())),
            template=template.source,
            tools_template=template.for_tools.source if template.for_tools else None,
            train_on=config.chat.train_on if config.kind == "sft" else "assistant",
            system=config.chat.system,
            system_rate=config.chat.system_rate,
            special_tokens_in_text=config.special_tokens_in_text,
            refused=tuple(refused),
        )
        for source, said in enumerate(config.sources.values())
    ]


def _format(config: MixConfig, inputs: Inputs, source: int) -> str:
    name, said = list(config.sources.items())[source]
    try:
        if said.format != "auto":
            reader(said.format, said.fields)  # knows the names of its fields
            return said.format
        assert config.kind != "pretrain", "of chats and pairs"
        return detect(_first_records(config, inputs, source), config.kind, said.fields)
    except ConfigError as error:
        raise ConfigError(f"sources.{name}: {error}") from None


def _first_records(config: MixConfig, inputs: Inputs, source: int) -> Sequence[dict[str, Any]]:
    reading = reading_of(config, list(config.sources.values())[source])
    units = (each.unit for each in inputs.units if inputs.files[each.file].source == source)
    items = chain.from_iterable(documents.read(unit, reading) for unit in units)
    return [item.value for item in islice((item for item in items if isinstance(item, Row)), _RECORDS)]
