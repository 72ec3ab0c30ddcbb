"""Configs of tiny models, one per family, and packed rows to run them on."""

from typing import Any

import numpy as np
import torch

from llmt_train.data.batch import PackedBatch, collate
from llmt_train.model.load import load_model

VOCAB = 97
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# A cap as low as the scores of small weights are: at Gemma's own 50 a test would not see it missing.
_GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 0.02}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "phi3": {**_COMMON, "sliding_window": 11},
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 16},
    "smollm3": {**_COMMON, "no_rope_layers": [1, 0]},
    "mistral": {**_COMMON, "sliding_window": 8},
    "gemma2": {**_COMMON, **_GEMMA},
    "gpt2": {**_GPT2, **_IDS, **_NO_DROPOUT},
    "granite": {**_COMMON, "logits_scaling": 8.0},
    "cohere": _COMMON,
    "phi": _COMMON,
    "olmo2": _COMMON,
    "stablelm": _COMMON,
    "llama4_text": {**_COMMON, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mamba2": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 1,
    },
    "falcon": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        **_IDS,
    },
}
FAMILIES = ("llama", "phi3", "qwen3", "mistral", "gemma2", "gpt2")
"""The families whose packed training is shown to be right."""


def tiny(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **keys: Any) -> Any:
    """A tiny model with packed attention, freshly drawn."""
    return load_model(
        {"from_config": {"model_type": model_type, **CONFIGS[model_type], **keys}}, dtype=dtype, seed=seed
    )


def packed(rows: list[list[int]], length: int, seed: int = 0, targets: float | None = None) -> PackedBatch:
    """Rows of random tokens whose segments have the given lengths."""
    tokens = np.random.default_rng(seed).integers(3, VOCAB, (len(rows), length))
    lengths = np.array([n for row in rows for n in row], np.int64)
    sources = np.arange(len(lengths)) % 2
    count = float(np.maximum(lengths - 1, 0).sum()) if targets is None else targets
    per_row = np.array([len(row) for row in rows])
    return collate(tokens, per_row, lengths, sources, None, {"targets": count})
