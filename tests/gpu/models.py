"""The models that the suite trains, as a run's config names them, and rows to train them on."""

from typing import Any

LLAMA_1B = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "bos_token_id": 128_000, "eos_token_id": 128_001,
}  # fmt: skip
"""The sizes of Llama 3.2 1B: 1.24e9 parameters."""

PHI_1B = {
    "model_type": "phi3", "vocab_size": 32_064, "hidden_size": 2304, "intermediate_size": 6144,
    "num_hidden_layers": 16, "num_attention_heads": 24, "num_key_value_heads": 24, "max_position_embeddings": 8192,
    "original_max_position_embeddings": 8192, "tie_word_embeddings": False,
    "pad_token_id": 32_000, "bos_token_id": 1, "eos_token_id": 32_000,
}  # fmt: skip
"""Phi-3 mini, narrower and with half its layers: 1.17e9 parameters, heads of 96."""

LLAMA_HALF = LLAMA_1B | {"vocab_size": 32_768, "num_hidden_layers": 8, "bos_token_id": 1, "eos_token_id": 2}
"""Half the layers and a quarter of the vocabulary: 0.55e9 parameters, to compare settings in less time."""

_TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "bos_token_id": 1}
TINY_LLAMA = LLAMA_1B | _TINY | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 2}
TINY_PHI = PHI_1B | _TINY | {"num_attention_heads": 4, "num_key_value_heads": 4, "eos_token_id": 2, "pad_token_id": 2}


def run_config(model: dict[str, Any], folder: str, length: int, step: int, micro_rows: int, **more: Any) -> Any:
    """Return the config of a run on rows of random tokens.

    Args:
        model: keys of `from_config`.
        folder: for the run.
        length: tokens of a row.
        step: rows of an optimizer step.
        micro_rows: rows of a micro-batch.
        more: other keys; ``train`` must say how long.
    """
    from llmt_train.config import RunConfig

    rest = {
        "task": "pretrain", "model": {"from_config": model}, "output": folder,
        # A quarter of the vocabulary: random tokens have that alone to teach.
        "data": {"synthetic": {"length": length, "median": length / 8, "vocab_size": model["vocab_size"] // 4}},
        "batch": {"tokens": length * step, "micro_rows": micro_rows},
        "optim": {"lr": 3e-4 if model["hidden_size"] > 64 else 1e-2, "schedule": "constant"},
        "precision": "bf16", "save": {"every": 10**6},
    }  # fmt: skip
    return RunConfig.model_validate(rest | more)
