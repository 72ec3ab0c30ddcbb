"""Are the model's positions enough for the dataset's rows and segments?"""

from transformers import PretrainedConfig

from llmt_shared.errors import ConfigError
from llmt_train.data.rows import AnySplit

_BATCH_DEPENDENT = ("longrope", "dynamic")
"""Rotary variants of transformers whose factors are switched by the longest position that they are given."""


def check_positions(config: PretrainedConfig, split: AnySplit, place: str) -> None:
    """Refuse segments longer than the model's positions.

    Positions restart with every segment, so with rotary positions only the longest segment counts. A table of
    learned positions is also read for a row's padding, which may be as long as the row.

    Raises:
        ConfigError: naming both lengths.
    """
    _check_rope(config, split, place)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or split.length <= limit:
        return
    is_rotary = getattr(config, "rope_parameters", None) is not None
    needed, what = (split.longest_segment(), "segments") if is_rotary else (split.length, "rows")
    if needed > limit:
        raise ConfigError(
            f"{place}: the model has {limit} positions (max_position_embeddings), but the dataset's {what} are up to "
            f"{needed} tokens long; pack with sequence.length <= {limit}, or give the model more positions"
        )


def _check_rope(config: PretrainedConfig, split: AnySplit, place: str) -> None:
    """Refuse rotary factors that the longest position of a batch chooses: a long document would change a short one."""
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(each for each in ropes.values() if isinstance(each, dict))):
        if rope.get("rope_type") not in _BATCH_DEPENDENT:
            continue
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if split.length > original and split.longest_segment() > original:
            raise ConfigError(
                f"{place}: rope_type {rope['rope_type']!r} changes for every document of a row when one is longer than "
                f"{original} tokens, and the dataset's longest segment is; pack with sequence.length <= {original}"
            )
