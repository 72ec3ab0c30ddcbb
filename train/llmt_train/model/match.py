"""Do the dataset's token ids mean to the model what they meant to the tokenizer that packed them?"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmt_shared.errors import ConfigError, FormatError


def check_tokenizers(dataset: Mapping[str, int], model: Mapping[str, int], place: str) -> None:
    """Refuse a dataset some of whose ids stand for another token in the model's tokenizer.

    Tokens that only one side has are fine, as long as no id is claimed by two tokens: `check_max_id` sees to the rest.

    Args:
        dataset: token -> id of the tokenizer that packed the dataset.
        model: token -> id of the model's own tokenizer.
        place: the model, for the message.

    Raises:
        ConfigError: naming the first three tokens that differ.
    """
    token_of = {index: token for token, index in model.items()}
    wrong = [
        f"{token!r} is {index} in the dataset, {_of_model(token, index, model, token_of)}"
        for token, index in sorted(dataset.items(), key=lambda item: item[1])
        if model.get(token, index) != index or token_of.get(index, token) != token
    ]
    if wrong:
        raise ConfigError(
            f"{place}: its tokenizer is not the one that packed the dataset; {len(wrong)} tokens differ, first: "
            f"{'; '.join(wrong[:3])}. Pack again with the model's tokenizer: `tokenizer: {place}` in mix.yaml"
        )


def _of_model(token: str, index: int, model: Mapping[str, int], token_of: Mapping[int, str]) -> str:
    if token in model:
        return f"{model[token]} in the model's"
    return f"where the model's has {token_of[index]!r}"


def check_max_id(max_id: int, num_embeddings: int, place: str) -> None:
    """Refuse ids that the model has no embedding for.

    Raises:
        ConfigError: ``max_id`` is not below ``num_embeddings``.
    """
    if max_id >= num_embeddings:
        raise ConfigError(
            f"{place}: the dataset's tokenizer can produce id {max_id}, but the model has {num_embeddings} embedding "
            f"rows; wanted a model with vocab_size >= {max_id + 1}, or a dataset packed with the model's tokenizer; "
            "`train.resize_embeddings: true` gives the model the rows that it lacks"
        )


def model_token_ids(model: str) -> dict[str, int] | None:
    """Return token -> id of a model folder's or hub id's tokenizer.json; ``None`` where it has none."""
    folder = Path(model).expanduser()
    path = folder / "tokenizer.json"
    if path.exists():
        return read_token_ids(path)
    if folder.exists():
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return read_token_ids(Path(hf_hub_download(model, "tokenizer.json")))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None  # the model is there, without a fast tokenizer
        raise ConfigError(f"model: {model!r} is neither a folder nor a hub id that can be reached: {error}") from None


def read_token_ids(path: Path) -> dict[str, int]:
    """Return token -> id of a tokenizer.json: its vocabulary with the added tokens.

    Raises:
        FormatError: the file is no tokenizer.json.
    """
    try:
        content = json.loads(path.read_bytes())
        vocabulary = _vocabulary(content["model"]["vocab"])
        added = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: not a tokenizer.json ({type(error).__name__}: {error})") from None
    return vocabulary | added


def _vocabulary(vocab: Any) -> dict[str, int]:
    if isinstance(vocab, Mapping):
        return {str(token): int(index) for token, index in vocab.items()}
    return {piece: index for index, (piece, _score) in enumerate(vocab)}  # Unigram: ids are the places in the list
