"""A step on tensors without content keeps what a real one keeps, operation by operation."""

from functools import partial

import pytest
import torch
from train.tiny_models import CONFIGS, packed, tiny

from llmt_shared.errors import ConfigError
from llmt_train.attention import Call
from llmt_train.check.dryrun import (
    Peaks,
    attention_calls,
    cpu_attention,
    fake_copy,
    gpu_attention,
    micro_batch,
    optimizer_step,
)
from llmt_train.check.livebytes import LiveBytes
from llmt_train.config import AdafactorConfig, AdamwConfig, CheckpointingConfig, MuonConfig, SgdConfig
from llmt_train.model.head import find_head, likely_head
from llmt_train.model.load import load_model, load_skeleton
from llmt_train.model.recompute import recompute
from llmt_train.objectives import clm
from llmt_train.optim import build_optimizer
from llmt_train.tasks import Task

TASK = Task(clm, clm, is_uniform=True)
NUM_TOKENS = 128
BATCH = packed([[40, 24], [50, 9]], NUM_TOKENS // 2)
MIXTURE = {**CONFIGS["llama"], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MODELS = {
    **{name: CONFIGS[name] for name in ("llama", "qwen3", "gpt2", "gemma2", "phi3", "olmo2")},
    "qwen3_moe": MIXTURE,
}
POLICIES = ("none", "selective", "attention", "full")


def skeleton(family, policy="none", dtype=torch.float32, **keys):
    model = load_skeleton({"from_config": {"model_type": family, **MODELS[family], **keys}}, dtype=dtype)
    recompute(model, CheckpointingConfig(policy=policy))
    return model


def dry(model, attention=cpu_attention, batch=BATCH, task=TASK) -> Peaks:
    with fake_copy(model, batch) as (fake, fake_batch):
        return micro_batch(fake, likely_head(fake), task, fake_batch, attention=attention)


def real(family, policy="none", task=TASK) -> Peaks:
    model = load_model({"from_config": {"model_type": family, **MODELS[family]}})
    recompute(model, CheckpointingConfig(policy=policy))
    return micro_batch(model, find_head(model), task, BATCH)


@pytest.mark.parametrize("family", MODELS)
def test_any_family_keeps_what_it_keeps_with_numbers(family):
    assert dry(skeleton(family)) == real(family)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_keeps_what_it_keeps_with_numbers(family, policy):
    assert dry(skeleton(family, policy)) == real(family, policy)


def test_a_loss_that_needs_all_logits_twice_is_counted_as_such():
    task = Task(partial(clm, label_smoothing=0.1), clm, with_mean=True)
    assert dry(skeleton("llama"), task=task) == real("llama", task=task)
    assert dry(skeleton("llama"), task=task).head != dry(skeleton("llama")).head


def test_a_models_own_logits_are_counted_as_such():
    task, model = Task(clm, clm), load_model({"from_config": {"model_type": "llama", **CONFIGS["llama"]}})
    with fake_copy(skeleton("llama"), BATCH) as (fake, fake_batch):
        found = micro_batch(fake, None, task, fake_batch, attention=cpu_attention)
    assert found == micro_batch(model, None, task, BATCH)
    num_labels, vocab_size = len(BATCH.label_places), CONFIGS["llama"]["vocab_size"]
    assert found.head > 2 * 4 * num_labels * vocab_size  # with their gradient


@pytest.mark.parametrize(
    ("policy", "elements"),
    [
        # Both norms keep their input, what is normalised of it, and their output: 6 h and 2 scales. Attention keeps
        # queries and its output, keys and values, the log-sum-exp; the output layer its input, a copy on a CPU. The
        # MLP keeps the gate before and after its activation, the other factor and the product.
        ("none", lambda h, f, H, K, D: 6 * h + 2 + 3 * H * D + 2 * K * D + H + 4 * f),
        # The layer's input, the output of attention and its log-sum-exp.
        ("attention", lambda h, f, H, K, D: h + H * D + H),
        ("full", lambda h, f, H, K, D: h),
    ],
)
def test_a_layer_keeps_what_is_counted_by_hand(policy, elements):
    """As Korthikanti et al. 2022 (arXiv:2205.05198) count, for RMSNorm, SwiGLU, grouped heads and fused attention."""
    two, three = (dry(skeleton("llama", policy, num_hidden_layers=layers)).kept for layers in (2, 3))
    assert three - two == 4 * NUM_TOKENS * elements(h=64, f=96, H=4, K=2, D=16)


def test_a_kernel_of_a_gpu_needs_no_copy_of_its_output():
    two, three = (dry(skeleton("llama", num_hidden_layers=layers), gpu_attention).kept for layers in (2, 3))
    assert three - two == 4 * NUM_TOKENS * (6 * 64 + 2 + 2 * 64 + 2 * 32 + 4 + 4 * 96)


def test_half_precision_keeps_half():
    """But for what norms compute in fp32 in any case, and the log-sum-exp."""
    in_half = dry(skeleton("llama", dtype=torch.bfloat16)).kept
    assert 0.5 < in_half / dry(skeleton("llama")).kept < 0.7


OPTIMIZERS = [
    AdamwConfig(lr=1e-3),
    MuonConfig(lr=1e-3, optimizer="muon"),
    AdafactorConfig(lr=1e-3, optimizer="adafactor"),
    SgdConfig(lr=1e-3, optimizer="sgd"),
    SgdConfig(lr=1e-3, optimizer="sgd", momentum=0.0),
]


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.optimizer)
def test_an_optimizer_keeps_what_it_keeps_with_numbers(config):
    build = partial(build_optimizer, config=config)
    wanted = optimizer_step(tiny("llama"), build)
    with fake_copy(skeleton("llama"), BATCH) as (fake, _):
        assert optimizer_step(fake, build) == wanted


@pytest.mark.parametrize(("config", "per_parameter"), [(OPTIMIZERS[0], 8), (OPTIMIZERS[3], 4), (OPTIMIZERS[4], 0)])
def test_an_optimizer_keeps_what_is_counted_by_hand(config, per_parameter):
    model = tiny("llama")
    parameters = list(model.parameters())
    counts_of_steps = 4 * len(parameters) if config.optimizer == "adamw" else 0
    wanted = per_parameter * sum(parameter.numel() for parameter in parameters) + counts_of_steps
    assert optimizer_step(model, partial(build_optimizer, config=config)).state == wanted


def test_bytes_are_counted_while_somebody_holds_them():
    known = torch.zeros(1000)
    with LiveBytes([known]) as counter:
        first = torch.zeros(10)
        view = first[:5]
        assert counter.live == 40
        known.add_(1)
        del first
        assert counter.live == 40  # the view holds them
        second = view + 1
        del view
        assert (counter.live, counter.take_peak()) == (20, 60)
    del second


def test_what_layers_ask_of_attention_is_known_without_running_them():
    call = Call(torch.float32, 16, 16)
    assert attention_calls(skeleton("llama")) == [call, call]
    assert attention_calls(skeleton("llama"), torch.bfloat16)[0].dtype == torch.bfloat16
    assert attention_calls(skeleton("gemma2"))[0].softcap
    assert attention_calls(skeleton("gpt2", attn_pdrop=0.1))[0].dropout


def test_a_model_that_never_asks_is_known_without_running_it():
    assert attention_calls(load_skeleton({"from_config": {"model_type": "bloom", **CONFIGS["bloom"]}})) == []


def test_a_model_that_drops_the_segments_is_refused_without_running_it():
    with pytest.raises(ConfigError, match="without segments"):
        attention_calls(load_skeleton({"from_config": {"model_type": "stablelm", **CONFIGS["stablelm"]}}))


def test_the_skeleton_is_left_as_it_was():
    model = skeleton("llama", tie_word_embeddings=True)
    dry(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
