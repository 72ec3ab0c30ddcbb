"""How a YAML config becomes a typed value, or one message that lists every mistake with its line.

YAML 1.2 is read with ruamel.yaml: `no` and `on` are strings, `1e-5` is a number, a repeated key is an error, and
nothing in a file can name a class or run code.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from annotated_types import Gt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from llmt_shared.errors import ConfigError
from llmt_shared.mistakes import CONFLICT, describe, short
from llmt_shared.objects import Location, ObjectPath, location_of

Model = TypeVar("Model", bound=BaseModel)


class StrictModel(BaseModel):
    """A piece of a config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterable[str]:
        """What is wrong between the keys of this piece, one message each; sees the values as the user wrote them."""
        del given
        return ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, given: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Report conflicts beside the mistakes in single keys, where pydantic would wait for those to be mended."""
        conflicts = [_conflict(text, given) for text in cls.conflicts(given)] if isinstance(given, Mapping) else []
        try:
            value = validate(given)
        except ValidationError as error:
            mistakes = [_again(mistake) for mistake in error.errors()]
            raise ValidationError.from_exception_data(cls.__name__, mistakes + conflicts) from None
        if conflicts:
            raise ValidationError.from_exception_data(cls.__name__, conflicts)
        return value


def _conflict(text: str, given: Mapping[str, Any]) -> InitErrorDetails:
    """A conflict at the key that its text begins with, if it begins with one: ``save.every: ..``, ```chat` is ..``."""
    match = re.match(r"`?([a-z_][\w.]*)", text)
    path: list[int | str] = []
    node: Any = given
    for part in match[1].rstrip(".").split(".") if match else ():
        if not isinstance(node, Mapping) or part not in node:
            break
        path.append(part)
        node = node[part]
    error = PydanticCustomError(CONFLICT, "{text}", {"text": text, "depth": len(path)})
    return InitErrorDetails(type=error, loc=tuple(path), input=given)


def _again(mistake: ErrorDetails) -> InitErrorDetails:
    """A reported mistake in the form in which it can be raised again."""
    ctx, kind = mistake.get("ctx", {}), mistake["type"]
    is_known = "url" in mistake  # of others, such as a path's, pydantic takes back only the message
    custom = kind if is_known else PydanticCustomError(kind, "{text}", {**ctx, "text": mistake["msg"]})
    return InitErrorDetails(type=custom, loc=mistake["loc"], input=mistake["input"], ctx=ctx)


def tag_of(given: Any, key: str, default: str) -> Any:
    """Return by which key's value a union of models is told apart: for a pydantic `Discriminator`.

    Args:
        given: a mapping, or one of the union's models.
        key: of the tag.
        default: where the key is missing, and for what is no mapping: then the default model says what was wanted.
    """
    value = given.get(key, default) if isinstance(given, Mapping) else getattr(given, key, default)
    return value if isinstance(value, str) else default


def load_config(path: Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Read and check a config file.

    Args:
        path: YAML file whose top level is a mapping.
        model: what the file must say.
        overrides: ``key.sub=value`` strings from the command line; values are read as YAML and win over the file.

    Raises:
        ConfigError: with one line per mistake: ``file:line: key: what is wrong; what was wanted``.
    """
    document = _read_yaml(path)
    for override in overrides:
        _apply_override(document, override)
    try:
        return model.model_validate(_plain(document))
    except ValidationError as error:
        overridden = {tuple(item.partition("=")[0].split(".")) for item in overrides}
        raise ConfigError("\n".join(describe(path, document, model, error.errors(), overridden))) from None


def _read_yaml(path: Path) -> CommentedMap:
    try:
        document = YAML(typ="rt", pure=True).load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; wanted a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); wanted YAML") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = str(error.problem or error).splitlines()[0]
        raise ConfigError(f"{path}:{line}: not valid YAML: {problem}") from None
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if document is None:
        raise ConfigError(f"{path}:1: the file is empty; wanted keys and values")
    if not isinstance(document, CommentedMap):
        raise ConfigError(f"{path}:1: the top level is a {_kind(document)}; wanted keys and values, such as `seed: 42`")
    return document


def _apply_override(document: CommentedMap, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"command line: {override!r} is not an override; wanted key.sub=value, such as optim.lr=3e-4")
    try:
        value = YAML(typ="rt", pure=True).load(text)
    except (YAMLError, ValueError):  # a ValueError is of something like a date that does not exist
        raise ConfigError(f"command line: {key}: {text!r} is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = document
    for depth, part in enumerate(parents):
        if node.get(part) is None:
            node[part] = CommentedMap()
        node = node[part]
        if not isinstance(node, CommentedMap):
            above = ".".join(parents[: depth + 1])
            raise ConfigError(f"command line: {key}: {above!r} is a {_kind(node)}; set {above} as a whole")
    node[last] = value


def _plain(node: Any) -> Any:
    """The same data in Python's own types; ruamel's carry the layout of the file."""
    if isinstance(node, Mapping):
        return {(str(key) if isinstance(key, str) else key): _plain(value) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [_plain(item) for item in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "mapping"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "list"
    return "nothing" if value is None else type(value).__name__


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BYTE_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


def _parse_quantity(value: object, units: Mapping[str, int], example: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"found {short(value)}; wanted a size, such as {example}")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].upper() not in units:
            raise ValueError(f"found {short(value)}; wanted a size, such as {example}")
        value = (
            float(match[1]) * units[match[2].upper()]
            if "." in match[1] or "e" in match[1].lower()
            else (int(match[1]) * units[match[2].upper()])
        )
    if not math.isfinite(value) or value != int(value) or value < 0:
        raise ValueError(f"found {short(value)}; wanted a whole number >= 0, such as {example}")
    return int(value)


UserPath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
"""A path as users write it: `~` is their home; relative to the working directory."""


def _location(value: object) -> Location:
    if isinstance(value, ObjectPath):
        return value
    if not isinstance(value, str | Path):
        raise ValueError(f"found {short(value)}; wanted a path or URL, such as s3://bucket/name")
    return location_of(value)


UserLocation = Annotated[
    Location,
    PlainValidator(_location),
    PlainSerializer(str, when_used="json"),
    WithJsonSchema({"type": "string"}),
]
"""A path as users write it, or a URL such as s3://bucket/name."""


def parse_count(value: object) -> int:
    """Read `20B`, `300M`, `4096`; raises ValueError for anything that is no whole number."""
    return _parse_quantity(value, _UNITS, "20B, 300M or 4096")


PositiveInt = Annotated[int, Gt(0)]

Count = Annotated[int, BeforeValidator(parse_count)]
"""A number of tokens or documents: `20B` is 20 000 000 000."""


def parse_bytes(value: object) -> int:
    """Read `512MB`, `2GiB`, `4096`; raises ValueError for anything that is no whole number."""
    return _parse_quantity(value, _BYTE_UNITS, "512MB or 2GiB")


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
"""A size in bytes: `512MB` is 512 000 000, `512MiB` is 536 870 912."""
