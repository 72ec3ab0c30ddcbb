"""What the bytes of a dataset depend on, as one hash. Same recipe, same dataset; anything else leaves it alone."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from llmt_prep.inputs import InputFile
from llmt_prep.tokenization import TOKENIZATION_VERSION
from llmt_shared.manifest import FORMAT_VERSION

PACKING_VERSION = 2
"""Raised when selection, order, packing or the arrays change for the same input."""


def recipe_of(mix: dict[str, Any], files: Sequence[InputFile], tokenizer_digest: str) -> str:
    """Return the sha256 of a resolved mix, its input files and its tokenizer."""
    parts = {
        "mix": mix,
        "files": [[file.source, file.name, file.sha256] for file in files],
        "tokenizer": tokenizer_digest,
        "versions": [TOKENIZATION_VERSION, PACKING_VERSION, FORMAT_VERSION],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
