"""Which models can be shared out over tp ranks, and what a person is told of those that cannot."""

from types import SimpleNamespace
from typing import Any

import pytest

from llmt_shared.errors import ConfigError
from llmt_train.parallel.plans import FAMILIES, check_plan, plan_of, shares_vocabulary, vocabulary_note


def config(**keys: Any) -> Any:
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 48}
    return SimpleNamespace(**{"model_type": "llama", **sizes, **keys})


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt2", "mamba2"])
def test_a_family_without_a_plan_is_sharded_by_fsdp_alone(model_type: str):
    assert plan_of(config(model_type=model_type)) is None
    with pytest.raises(ConfigError, match=f"tp: 2, but {model_type} has no plan .*llama.*set `parallel: {{tp: 1}}`"):
        check_plan(config(model_type=model_type), 2)


@pytest.mark.parametrize("tp", [1, 2, 3, 6])
def test_what_divides_has_its_familys_plan(tp: int):
    assert check_plan(config(), tp) is FAMILIES["llama"]


@pytest.mark.parametrize(
    ("keys", "tp", "message"),
    [
        ({}, 4, "tp: 4 does not divide llama's 6 key/value heads; legal: 1, 2, 3, 6"),
        ({}, 5, "12 attention heads nor its 6 key/value heads nor its 48 MLP features .*; legal: 1, 2, 3, 6"),
        ({"intermediate_size": 49}, 2, r"49 MLP features \(intermediate_size\); legal: 1$"),
    ],
)
def test_all_that_does_not_divide_is_told_at_once(keys: dict[str, int], tp: int, message: str):
    with pytest.raises(ConfigError, match=message):
        check_plan(config(**keys), tp)


def test_a_vocabulary_that_does_not_divide_is_whole_on_every_rank_and_said_so():
    assert shares_vocabulary(49152, 2)
    assert vocabulary_note(49152, 2) is None
    assert not shares_vocabulary(49155, 2)
    assert "tp 2 does not divide the 49,155 rows" in str(vocabulary_note(49155, 2))
