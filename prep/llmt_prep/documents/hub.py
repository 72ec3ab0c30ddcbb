"""Datasets of the Hugging Face Hub, through `datasets`: the only file that imports it."""

import re
from pathlib import Path
from typing import Any

from llmt_shared.errors import ConfigError


def hf_files(repo_id: str, name: str | None, split: str, revision: str | None) -> tuple[list[Path], str]:
    """Download and convert one split, and return its Arrow files in row order and the commit that they come from.

    Args:
        repo_id: hub id, or a local folder in the layout that ``datasets`` reads.
        name: configuration of the dataset, where it has several.
        split: one whole split.
        revision: branch, tag or commit; ``None`` is the newest.

    Returns:
        The files, and the pinned commit; it is empty for a local folder.

    Raises:
        ConfigError: unknown dataset, configuration or split; a slice of a split; no network; code would have to run.
    """
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ConfigError(f"{repo_id}: split {split!r}; wanted the name of one whole split, such as train")
    import datasets

    try:
        builder = datasets.load_dataset_builder(
            repo_id, name, revision=revision
        )  # since 4.0 it runs no code of a dataset
        builder.download_and_prepare()
        files = [Path(each["filename"]) for each in _split_of(repo_id, builder, split).cache_files]
    except ConfigError:
        raise
    except Exception as error:  # `datasets` and what lies below raise some thirty kinds for a wrong id or no network
        raise ConfigError(f"{repo_id}: cannot be loaded with `datasets`: {_first_line(error)}") from None
    return files, _commit(repo_id, builder)


def _split_of(repo_id: str, builder: Any, split: str) -> Any:
    known = list(builder.info.splits)
    if split not in known:
        raise ConfigError(f"{repo_id}: no split {split!r}; it has {', '.join(known)}")
    return builder.as_dataset(split=split)


def _commit(repo_id: str, builder: Any) -> str:
    """The commit that the builder was made from: `datasets` uses it as the hash in the name of the cache folder."""
    is_commit = re.fullmatch(r"[0-9a-f]{40}", str(builder.hash)) is not None
    return builder.hash if is_commit and not Path(repo_id).exists() else ""


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
