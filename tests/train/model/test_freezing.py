"""What is frozen does not move, and a pattern that finds nothing is no silent mistake."""

import pytest
from train.tiny_models import tiny

from llmt_shared.errors import ConfigError
from llmt_train.model.freezing import freeze, matching


def frozen(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_parameters_that_a_pattern_is_found_in_do_not_train():
    model = tiny("llama")
    freeze(model, (r"embed_tokens", r"layers\.0\.mlp\."))
    assert frozen(model) == {
        "model.embed_tokens.weight",
        *(f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }


def test_without_patterns_everything_trains():
    model = tiny("llama")
    freeze(model, ())
    assert not frozen(model)


def test_a_pattern_that_finds_nothing_is_told_with_names_like_it():
    with pytest.raises(ConfigError, match=r"'layrs.0.mlp' is found in no .*; there are model.layers.0.mlp"):
        freeze(tiny("llama"), ("layrs.0.mlp",))


def test_a_model_with_nothing_left_to_train_is_refused():
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze(tiny("llama"), (".",))


def test_a_parameter_found_twice_is_returned_once():
    assert len(matching(tiny("llama"), ("embed", "embed_tokens"), "key")) == 1
