"""What a simulation is asked: `documents=1e10,machines=64,cores=32,disk=2GB/s`."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError
from ruamel.yaml.comments import CommentedMap

from llmt_shared.config import Bytes, Count, StrictModel
from llmt_shared.errors import ConfigError
from llmt_shared.mistakes import describe, short

EXAMPLE = "documents=1e10,machines=64,cores=32,disk=2GB/s"
_PREFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_RATE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]+)?)\s*([kKMGT]?)(B|b|bit)/s\s*")


def parse_rate(value: object) -> float:
    """Read `2GB/s`, or `25Gb/s` and `25Gbit/s`, which are an eighth of it; bytes per second.

    Raises:
        ValueError: it is neither, or nothing would ever be moved.
    """
    match = _RATE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"found {short(value)}; wanted a rate, such as 2GB/s, or 25Gbit/s")
    rate = float(match[1]) * _PREFIXES[match[2]] / (1 if match[3] == "B" else 8)
    if not 1 <= rate < float("inf"):
        raise ValueError(f"found {short(value)}; wanted at least one byte per second")
    return rate


Rate = Annotated[float, BeforeValidator(parse_rate)]
AtLeastOne = Annotated[Count, Field(ge=1)]


class Scenario(StrictModel):
    """How large the corpus is said to be, and what it is packed on."""

    documents: AtLeastOne | None = None
    """Of all sources together, in the proportions that they have now; without a size, the corpus as it is."""
    bytes: Annotated[Bytes, Field(ge=1)] | None = None
    """Of input, as it lies on the disk."""
    tokens: AtLeastOne | None = None
    """Of all documents, before anything is held out or sampled."""
    machines: AtLeastOne = 1
    cores: AtLeastOne | None = None
    """Of each machine, with one worker each; by default the workers that `pack` would start here."""
    disk: Rate | None = None
    """Most that a machine reads and writes in a second."""
    network: Rate | None = None
    """The same where data come and go over a network."""
    sample: Annotated[Bytes, Field(ge=1)] = 64_000_000
    """Input of each source that is really tokenized and packed, about."""

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterable[str]:
        """A corpus has one size."""
        said = [key for key in ("documents", "bytes", "tokens") if given.get(key) is not None]
        if len(said) > 1:
            yield f"says {' and '.join(said)}; a corpus has one size: give one of them"


def parse_scenario(text: str) -> Scenario:
    """Read `key=value,key=value`; nothing at all is the corpus as it is, on this machine.

    Raises:
        ConfigError: with one line for each mistake.
    """
    given = CommentedMap()
    wrong = list(_read(text, given))
    try:
        scenario = Scenario.model_validate(dict(given))
    except ValidationError as error:
        everything = [(key,) for key in given]
        wrong += describe(Path("--simulate"), given, Scenario, error.errors(), everything)
    if wrong:
        raise ConfigError("\n".join(re.sub("^(command line|--simulate:1):", "--simulate:", line) for line in wrong))
    return scenario


def _read(text: str, given: CommentedMap) -> Iterator[str]:
    """Fill ``given``; yields what is no `key=value`, or comes twice."""
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (each.strip() for each in part.partition("="))
        if not key or not value:
            yield f"--simulate: {short(part)} is not a setting; wanted key=value, such as {EXAMPLE}"
        elif key in given:
            yield f"--simulate: {key}: said twice; keep one of them"
        else:
            given[key] = value
