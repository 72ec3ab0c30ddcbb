"""The probe: which models may train on packed rows."""

import pytest
import torch
from train.tiny_models import FAMILIES, tiny
from transformers import AttentionInterface, AttentionMaskInterface

from llmt_shared.errors import ConfigError
from llmt_train.attention import Segments
from llmt_train.attention.transformers_hook import attend
from llmt_train.config import ParallelConfig
from llmt_train.model.isolation import check_isolation
from llmt_train.parallel.mesh import open_mesh
from llmt_train.parallel.sharding import shard


@pytest.mark.parametrize("family", [*FAMILIES, "granite", "cohere", "olmo2"])
def test_families_that_keep_segments_apart_pass(family):
    check_isolation(tiny(family))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_pass(dtype):
    check_isolation(tiny("llama", dtype=dtype))
    check_isolation(tiny("gemma2", dtype=dtype))


def in_bf16(model):
    """The model as a run computes with it: weights in fp32, arithmetic in bf16."""
    shard(model, open_mesh(ParallelConfig()), compute=torch.bfloat16)
    return model


@pytest.mark.usefixtures("process_group")
def test_arithmetic_in_bf16_passes():
    check_isolation(in_bf16(tiny("qwen3")), compute=torch.bfloat16)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("initializer_range", [0.02, 1e-3])
def test_a_freshly_drawn_model_passes_in_bf16(initializer_range):
    check_isolation(in_bf16(tiny("llama", initializer_range=initializer_range)), compute=torch.bfloat16)


@pytest.mark.usefixtures("process_group")
def test_one_document_instead_of_two_is_seen_in_bf16():
    model = use(tiny("llama", initializer_range=0.02), "test-merged", leaking(lambda lengths: [sum(lengths)]))
    with pytest.raises(ConfigError):
        check_isolation(in_bf16(model), compute=torch.bfloat16)


@pytest.mark.parametrize("family", ["bloom", "mamba2"])
def test_families_that_ignore_the_function_are_refused_by_name(family):
    with pytest.raises(ConfigError, match=rf"{family}: documents of a packed row see each other: changing the earlier"):
        check_isolation(tiny(family))


def test_a_family_that_drops_the_segments_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"stablelm: cannot run on packed rows: .*without segments"):
        check_isolation(tiny("stablelm"))


def leaking(borders):
    """Packed attention whose segments are wrong: ``borders`` makes them of the right lengths."""

    def attend_wrongly(module, query, key, value, attention_mask=None, *, segments, **keywords):
        wrong = Segments.from_lengths(borders(list(segments.lengths)))
        return attend(module, query, key, value, attention_mask, segments=wrong, **keywords)

    return attend_wrongly


def use(model, name, function):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    model.set_attn_implementation(name)
    return model


@pytest.mark.parametrize("initializer_range", [0.02, 1e-3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_document_instead_of_two_is_seen_in_a_freshly_drawn_model(family, initializer_range):
    model = use(
        tiny(family, initializer_range=initializer_range), "test-merged", leaking(lambda lengths: [sum(lengths)])
    )
    with pytest.raises(ConfigError, match=rf"{family}: documents of a packed row see each other"):
        check_isolation(model)


@pytest.mark.parametrize("initializer_range", [0.02, 1e-3])
def test_a_border_that_is_one_token_off_is_seen(initializer_range):
    def shifted(lengths):
        return [lengths[0] - 1, lengths[1] + 1] if len(lengths) == 2 else lengths

    model = use(tiny("llama", initializer_range=initializer_range), "test-shifted", leaking(shifted))
    with pytest.raises(ConfigError, match="see each other"):
        check_isolation(model)


def test_a_border_too_many_is_seen():
    def cut(lengths):
        return [lengths[0], lengths[1] - 2, 2] if len(lengths) == 2 else lengths

    model = use(tiny("llama"), "test-cut", leaking(cut))
    with pytest.raises(ConfigError, match="has other logits than alone"):
        check_isolation(model)


def test_a_model_whose_attention_moves_nothing_cannot_be_checked():
    model = tiny("llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(ConfigError, match="llama: isolation cannot be checked"):
        check_isolation(model)


def test_logits_that_are_not_numbers_are_refused():
    model = tiny("llama")
    torch.nn.init.constant_(model.model.layers[0].self_attn.v_proj.weight, float("nan"))
    with pytest.raises(ConfigError, match="llama: "):
        check_isolation(model)


def test_every_mode_and_the_random_state_are_as_before():
    model = tiny("gpt2")
    model.transformer.h[0].eval()
    modes, state = [m.training for m in model.modules()], torch.random.get_rng_state()
    check_isolation(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_modes_are_restored_when_the_model_is_refused():
    model = tiny("bloom")
    with pytest.raises(ConfigError):
        check_isolation(model)
    assert all(m.training for m in model.modules())


def test_a_forced_backend_that_cannot_serve_is_told():
    with pytest.raises(ConfigError, match="flash2 needs a CUDA device"):
        check_isolation(tiny("llama"), attention="flash2")
