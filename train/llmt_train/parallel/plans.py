"""How the layers of each family of models are shared out over the ranks of the tp axis.

A family is an entry of `FAMILIES`, by transformers' ``model_type``. Names are those of modules inside a layer; they are
the same in transformers 5.17 to 5.23, and `tensor_parallel` refuses a model that has others.
"""

from collections.abc import Callable
from math import gcd
from typing import Any, NamedTuple

from llmt_shared.errors import ConfigError


class Part(NamedTuple):
    """Some consecutive rows of a fused layer, as a layer of their own."""

    name: str
    rows: Callable[[Any], int]
    """How many, by the model's config."""


class Fused(NamedTuple):
    """Layers whose weights lie one below the other on disk, in one matrix; cut by rows it would give ranks nonsense."""

    name: str
    parts: tuple[Part, ...]


class Plan(NamedTuple):
    """Which layers hold a share of the rows of their weights, and which of the columns (Shoeybi et al. 2019)."""

    column: tuple[str, ...]
    """Linear layers that give a share of heads or of the MLP's features: their rows are shared out."""
    row: tuple[str, ...]
    """Linear layers that read such a share; what they give is summed over ranks."""
    entries: tuple[str, ...]
    """Modules that read whole tokens: attention and MLP."""
    head_norms: tuple[str, ...] = ()
    """Norms of every head with one weight, which all heads share."""
    projection_norms: tuple[str, ...] = ()
    """Norms over all heads together, each with weights of its own."""
    fused: tuple[Fused, ...] = ()
    """What must be split first (`split_fused`)."""


def _query_rows(config: Any) -> int:
    return int(config.num_attention_heads * _head_dim(config))


def _key_rows(config: Any) -> int:
    return int(config.num_key_value_heads * _head_dim(config))


def _feature_rows(config: Any) -> int:
    return int(config.intermediate_size)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA = Plan(column=(*_ATTENTION, *_MLP), row=("self_attn.o_proj", "mlp.down_proj"), entries=("self_attn", "mlp"))
_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_QKV = Fused(
    "self_attn.qkv_proj",
    tuple(Part(name, rows) for name, rows in zip(_ATTENTION, (_query_rows, _key_rows, _key_rows), strict=True)),
)
_GATE_UP = Fused("mlp.gate_up_proj", tuple(Part(name, _feature_rows) for name in _MLP))

FAMILIES: dict[str, Plan | None] = {
    "llama": _LLAMA,  # Llama 2, 3, 3.x; SmolLM, SmolLM2
    "mistral": _LLAMA,
    "qwen2": _LLAMA,  # Qwen 2 and 2.5
    "qwen3": _LLAMA._replace(head_norms=_NORMS),
    "phi3": _LLAMA._replace(fused=(_QKV, _GATE_UP)),  # Phi-3, 3.5, 4
    "smollm3": _LLAMA,
    "olmo2": _LLAMA._replace(projection_norms=_NORMS),
    "gemma2": _LLAMA,
    "granite": _LLAMA,
    "mixtral": None,
    "qwen3_moe": None,
}
"""``None``: known, and trained by sharding parameters alone (FSDP)."""


def plan_of(config: Any) -> Plan | None:
    """Return how a model's layers are shared out; ``None`` where that is not known, or not done: FSDP only.

    Args:
        config: of transformers.
    """
    return FAMILIES.get(config.model_type)


def check_plan(config: Any, tp: int) -> Plan:
    """Return the plan of a model whose layers can be shared out over ``tp`` ranks.

    Raises:
        ConfigError: there is no plan; or heads or features do not divide.
    """
    plan = plan_of(config)
    if plan is None:
        families = ", ".join(name for name, known in FAMILIES.items() if known is not None)
        raise ConfigError(
            f"parallel.tp: {tp}, but {config.model_type} has no plan for sharing out its layers (there are plans for "
            f"{families}); set `parallel: {{tp: 1}}`: its parameters are sharded over all devices all the same (FSDP)"
        )
    odd = [f"{count} {what}" for what, count in _divided(config).items() if count % tp]
    if odd:
        common = gcd(*_divided(config).values())
        legal = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
        raise ConfigError(
            f"parallel.tp: {tp} does not divide {config.model_type}'s {' nor its '.join(odd)}; legal: {legal}"
        )
    return plan


def _divided(config: Any) -> dict[str, int]:
    return {
        "attention heads": config.num_attention_heads,
        "key/value heads": config.num_key_value_heads,
        "MLP features (intermediate_size)": config.intermediate_size,
    }


def shares_vocabulary(num_rows: int, tp: int) -> bool:
    """Return whether embedding and output layer are shared out over ranks too: not where their rows do not divide.

    Then every rank holds them whole and computes all logits; say so where a person reads it, with `vocabulary_note`.
    DTensor and FSDP2 do take uneven parts (torch 2.13); what joins parts, `collectives`, does not.
    """
    return num_rows % tp == 0


def vocabulary_note(num_rows: int, tp: int) -> str | None:
    """Return what a person should know of a vocabulary that is not shared out; ``None`` if it is."""
    if shares_vocabulary(num_rows, tp):
        return None
    return (
        f"note: tp {tp} does not divide the {num_rows:,} rows of embedding and output layer: every rank of tp holds "
        "them whole and computes all logits, which takes more memory and time"
    )
