"""Where each unit of the input is, or will be, in the token store: its key is the hash of what its tokens depend on.

Of a unit only `corpus.UNIT` is kept, for there may be millions; the rest is put together when it is asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep import documents
from llmt_prep.cache import Origin, units_of
from llmt_prep.config import MixConfig
from llmt_prep.corpus import UNIT
from llmt_prep.documents import Reading, Unit
from llmt_prep.inputs import InputFile, Inputs, InputUnit, reading_of
from llmt_prep.store import unit_folder
from llmt_prep.tokenization import TextSettings, unit_facts, unit_key
from llmt_prep.tokenizer import LoadedTokenizer

if TYPE_CHECKING:
    from llmt_prep.chat.prepare import ChatSettings


class Place(NamedTuple):
    """Where a unit belongs and where its tokens are or will be."""

    file: int
    """Index of the input file."""
    source: int
    unit: Unit
    span: tuple[int, int]
    """Bytes of the file that the unit reads, about."""
    settings: "TextSettings | ChatSettings"
    origin: Origin
    directory: Path
    begins_source: bool
    """Whether it is the first unit of its source."""

    @property
    def bytes(self) -> int:
        """Bytes of input, about."""
        return self.span[1] - self.span[0]


@dataclass(frozen=True, eq=False)
class Places:
    """The places of all units, U of them, of F files; equal units share a folder."""

    config: MixConfig
    inputs: Inputs
    tokenizer: LoadedTokenizer
    readings: Sequence[Reading]
    settings: "Sequence[TextSettings] | Sequence[ChatSettings]"
    """Of each source, as are the readings."""
    folders: tuple[Path, ...]
    """Where units are written; then, where it is said, the other folder in which they are looked for first."""
    units: NDArray[np.void]
    """[U] of `UNIT`, without what only tokenizing tells."""
    first_unit: NDArray[np.int64]
    """[F + 1]; of each file, then U."""
    bytes_of_source: NDArray[np.int64]
    """[sources]; of input, about."""

    def __len__(self) -> int:
        """U."""
        return len(self.units)

    def __getitem__(self, number: int) -> Place:
        """All that is known of one unit."""
        each = self.inputs.units[number]
        source = self.inputs.files[each.file].source
        return Place(
            file=each.file,
            source=source,
            unit=each.unit,
            span=each.span,
            settings=self.settings[source],
            origin=_origin(self.config, self.inputs.files[each.file], _facts(self, each)),
            directory=self.directory(number),
            begins_source=number == 0 or bool(self.units["source"][number - 1] != source),
        )

    def __iter__(self) -> Iterator[Place]:
        """All of them, in order."""
        return (self[number] for number in range(len(self)))

    def size(self, number: int) -> int:
        """Return the bytes of input of a unit, about."""
        first, last = self.inputs.units[number].span
        return last - first

    def key(self, number: int) -> bytes:
        """Return a unit's name in the token store."""
        return bytes(self.units["key"][number].tobytes())

    def directory(self, number: int) -> Path:
        """Return the folder of a unit."""
        return unit_folder(self.folders[self.units["folder"][number]], self.key(number).hex())

    def are_there(self) -> NDArray[np.bool_]:
        """Look which units there are: [U]."""
        return np.fromiter((self.directory(number).exists() for number in range(len(self))), np.bool_, len(self))

    def are_first(self) -> NDArray[np.bool_]:
        """Return which units are the first of their key: [U]."""
        keys = self.units["key"]
        beginning = np.ndarray(len(self), "<u8", self.units, strides=self.units.strides).copy()  # takes less memory
        order = np.argsort(beginning, kind="stable")
        is_same = np.diff(beginning[order]) == 0
        likely = np.union1d(order[:-1][is_same], order[1:][is_same])  # that it is not the only one
        _, first = np.unique(keys[likely].view("S32"), return_index=True)
        is_first = np.ones(len(self), np.bool_)
        is_first[likely] = False
        is_first[likely[first]] = True
        return is_first


def place_units(
    config: MixConfig, inputs: Inputs, tokenizer: LoadedTokenizer, cache: Path, known: Path | None = None
) -> Places:
    """Return where a cache holds each unit of the input, or would hold it.

    Args:
        config: the mix.
        inputs: hashed files.
        tokenizer: loaded tokenizer.
        cache: where units are written.
        known: another cache, in which they are taken to be at first.
    """
    places = Places(
        config=config,
        inputs=inputs,
        tokenizer=tokenizer,
        readings=[reading_of(config, source) for source in config.sources.values()],
        settings=_settings(config, inputs, tokenizer),
        folders=(units_of(cache),) if known is None else (units_of(cache), units_of(known)),
        units=np.zeros(len(inputs.units), UNIT),
        first_unit=np.zeros(len(inputs.files) + 1, np.int64),
        bytes_of_source=np.zeros(len(config.sources), np.int64),
    )
    places.units["folder"] = len(places.folders) - 1
    for number, each in enumerate(inputs.units):
        source = inputs.files[each.file].source
        places.units["source"][number] = source
        places.units["key"][number] = np.void(bytes.fromhex(unit_key(_facts(places, each))))
        places.first_unit[each.file + 1] += 1
        places.bytes_of_source[source] += each.span[1] - each.span[0]
    np.cumsum(places.first_unit, out=places.first_unit)
    return places


def with_formats(config: MixConfig, inputs: Inputs) -> MixConfig:
    """Return the mix with the format of every source of chats or pairs said."""
    if config.kind == "pretrain":
        return config
    from llmt_prep.chat import settings  # text needs no templates

    return settings.with_formats(config, inputs)


def full_name_of(file: InputFile) -> str:
    """Return what units say of the file that they were made of: see `Origin`."""
    return documents.full_name(file.path) if file.name == file.path else file.name


def _settings(
    config: MixConfig, inputs: Inputs, tokenizer: LoadedTokenizer
) -> "Sequence[TextSettings] | Sequence[ChatSettings]":
    """Of each source."""
    if config.kind == "pretrain":
        text = TextSettings(special_tokens_in_text=config.special_tokens_in_text, bos=config.bos, eos=config.eos)
        return [text] * len(config.sources)
    from llmt_prep.chat.settings import chat_settings  # text needs no templates

    return chat_settings(with_formats(config, inputs), tokenizer)


def _facts(places: Places, each: InputUnit) -> dict[str, Any]:
    source = places.inputs.files[each.file].source
    return unit_facts(each.unit, each.content, places.readings[source], places.tokenizer, places.settings[source])


def _origin(config: MixConfig, file: InputFile, facts: dict[str, Any]) -> Origin:
    return Origin(facts, full_name_of(file), file.sha256, config.unit_size, config.tokenizer.path)
