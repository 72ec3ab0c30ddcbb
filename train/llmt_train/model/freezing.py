"""Which parameters train, by their names."""

import difflib
import re
from collections.abc import Sequence

from torch import nn

from llmt_shared.errors import ConfigError


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop the parameters from training in whose names one of the patterns is found.

    Raises:
        ConfigError: a pattern is found nowhere; or nothing is left to train.
    """
    for parameter in matching(model, patterns, "train.freeze"):
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("train.freeze: nothing is left to train; wanted patterns that leave some parameters out")


def matching(model: nn.Module, patterns: Sequence[str], key: str) -> list[nn.Parameter]:
    """Return the parameters in whose names one of the patterns is found.

    Args:
        model: any.
        patterns: regular expressions.
        key: of the config, for the message.

    Raises:
        ConfigError: a pattern is found nowhere; it names parameters like it.
    """
    named = dict(model.named_parameters())
    found: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        names = [name for name in named if re.search(pattern, name)]
        if not names:
            near = difflib.get_close_matches(pattern, named, n=2, cutoff=0.0)
            raise ConfigError(f"{key}: {pattern!r} is found in no parameter's name; there are {', '.join(near)}, ..")
        found |= {name: named[name] for name in names}
    return list(found.values())
