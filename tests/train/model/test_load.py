"""Models with packed attention against plain transformers, one segment at a time; what cannot be loaded and why."""

import json

import pytest
import torch
from train.tiny_models import CONFIGS, FAMILIES, VOCAB, packed, tiny

from llmt_shared.errors import ConfigError
from llmt_shared.segments import IGNORE
from llmt_train.model.load import forward_hidden, load_model, load_skeleton

ROWS = [[5, 30, 1, 17, 23], [40, 40]]
LENGTH = 80


def plain(model):
    """The same model as transformers runs it by itself."""
    model.set_attn_implementation("eager")
    return model.eval()


def pieces(batch):
    """Tokens and labels of the segments, without the padding."""
    parts = zip(
        batch.input_ids[0].split(batch.lengths),
        batch.labels[0].split(batch.lengths),
        batch.segment_source.tolist(),
        strict=True,
    )
    return [(tokens, labels) for tokens, labels, source in parts if source >= 0]


def gradients(model, loss):
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def gradient_error(got, wanted):
    """The largest over parameters of |g - g'| / max(|g|, 1e-3 of the largest norm), in 2-norms."""
    assert got.keys() == wanted.keys()
    floor = 1e-3 * max(g.norm() for g in wanted.values())
    return max(((got[name] - g).norm() / torch.maximum(g.norm(), floor)).item() for name, g in wanted.items())


# Scaled so strongly that positions below 40 feel it.
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_skeleton_is_the_model_without_weights(family):
    spec = {"from_config": {"model_type": family, **CONFIGS[family]}}
    model, skeleton = load_model(spec), load_skeleton(spec, dtype=torch.bfloat16)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in skeleton.named_parameters()} == shapes
    assert {(weight.device.type, weight.dtype) for weight in skeleton.parameters()} == {("meta", torch.bfloat16)}
    assert skeleton.training
    assert skeleton.config.to_dict() | {"dtype": None} == model.config.to_dict() | {"dtype": None}


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        *((family, {}) for family in FAMILIES),
        *(("llama", {"rope_parameters": {"rope_theta": 1e4, **rope}}) for rope in ROPES.values()),
    ],
    ids=[*FAMILIES, *(f"llama with {name} rope" for name in ROPES)],
)
def test_packed_equals_alone(family, keys):
    """Logits and gradients of every segment are those of plain transformers, one segment at a time."""
    model, batch = tiny(family, **keys).eval(), packed(ROWS, LENGTH)
    ids = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    logits = model(**ids, segments=batch.segments()).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, batch.labels[0], ignore_index=IGNORE, reduction="sum")
    got = gradients(model, loss / batch.denominators["targets"])

    reference = plain(model)
    alone = [(reference(input_ids=tokens[None]).logits[0], labels) for tokens, labels in pieces(batch)]
    padding = torch.repeat_interleave(batch.segment_source, torch.tensor(batch.lengths)) < 0
    assert (logits[~padding] - torch.cat([part for part, _ in alone])).abs().max() <= 1e-5
    losses = [torch.nn.functional.cross_entropy(x, y, ignore_index=IGNORE, reduction="sum") for x, y in alone]
    wanted = gradients(reference, torch.stack(losses).nansum() / batch.denominators["targets"])
    assert gradient_error(got, wanted) <= 1e-5


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_a_scaled_rope_is_honoured(rope):
    batch = packed(ROWS, LENGTH)
    scaled, plain = (
        forward_hidden(tiny("llama", rope_parameters=parameters), batch)
        for parameters in ({"rope_theta": 1e4, **rope}, {"rope_theta": 1e4, "rope_type": "default"})
    )
    assert (scaled - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_what_the_head_reads(family):
    model, batch = tiny(family), packed(ROWS, LENGTH)
    hidden = forward_hidden(model, batch)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments()).logits[0]
    assert hidden.shape == (2 * LENGTH, 64)
    cap = 30.0 if family == "gemma2" else None
    made = model.get_output_embeddings()(hidden)
    torch.testing.assert_close(cap * torch.tanh(made / cap) if cap else made, logits, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # oldest name
def test_gradient_checkpointing_changes_no_gradient():
    batch = packed(ROWS, LENGTH)
    results = []
    for checkpointing in (False, True):
        model = tiny("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(gradients(model, forward_hidden(model, batch).square().sum()))
    assert gradient_error(results[1], results[0]) == 0


def test_the_seed_draws_the_weights_and_leaves_torch_alone():
    before = torch.random.get_rng_state()
    first, again, other = (tiny("llama", seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_models_come_in_training_mode_without_cache_and_in_the_dtype_asked_for(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    for model in (tiny("gpt2", dtype=torch.float64), load_model(str(tmp_path), dtype=torch.float64)):
        assert model.training
        assert model.config.use_cache is False
        assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_folder_gives_back_the_saved_weights(tmp_path):
    saved = tiny("llama", seed=3)
    saved.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.config._attn_implementation == "llmt"
    wanted = saved.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def build(**keys):
    return load_model({"from_config": keys})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is not known to transformers, did you mean 'llama'"),
        ({}, "model_type None is not known"),
        ({"model_type": "vit"}, "vit has no causal language model"),
        ({"model_type": "llama", "hiden_size": 64}, "llama has no 'hiden_size', did you mean 'hidden_size'"),
        ({"model_type": "llama", "hidden_size": "wide"}, "llama: .*expected int, got str"),
        ({**CONFIGS["llama"], "model_type": "llama", "hidden_size": 66}, "not a multiple of the number of attention"),
        ({**CONFIGS["llama"], "model_type": "llama", "hidden_act": "reelu"}, "llama cannot be built: .*reelu"),
        ({**CONFIGS["llama4_text"], "model_type": "llama4_text"}, "llama4_text: has layers with chunked attention"),
        ({**CONFIGS["falcon"], "model_type": "falcon"}, "falcon cannot be built: its attention is its own"),
    ],
)
def test_a_config_that_cannot_work_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        build(**keys)


def test_keys_of_older_configs_and_undeclared_ones_that_the_model_reads_are_known():
    assert build(**CONFIGS["llama"], model_type="llama", rope_theta=5e5).config.rope_parameters["rope_theta"] == 5e5
    assert build(**CONFIGS["granite"], model_type="granite").config.logits_scaling == 8.0
    moe = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 24}
    model = build(**CONFIGS["llama"], **moe, model_type="qwen3_moe")
    assert model.model.layers[0].self_attn.q_proj.out_features == 4 * 24


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}/none: no such folder"):
        load_model(str(tmp_path / "none"))


def test_a_folder_without_safetensors_is_refused(tmp_path):
    """Nothing is unpickled, not even a well-meant pytorch_model.bin."""
    tiny("llama").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even read")
    with pytest.raises(ConfigError, match=r"cannot be loaded in this folder.*\*\.safetensors"):
        load_model(str(tmp_path))


def test_a_model_with_code_of_its_own_is_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config | own))
    (tmp_path / "own.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ConfigError, match="no code of its own"):
        load_model(str(tmp_path))


def test_damaged_weights_are_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ConfigError, match="cannot be loaded in this folder"):
        load_model(str(tmp_path))


def test_weights_of_another_shape_are_named(tmp_path):
    model = tiny("llama")
    state = model.state_dict() | {"model.norm.weight": torch.ones(3)}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        ConfigError, match=r"model\.norm\.weight is \[3\] in \*\.safetensors, but \[64\] by config\.json"
    ):
        load_model(str(tmp_path))


def test_quantized_weights_are_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"cannot be loaded in this folder: its weights are quantized \(bitsandbytes\)"
    ):
        load_model(str(tmp_path))


def test_weights_that_are_not_there_are_not_drawn_in_silence(tmp_path):
    model = tiny("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if "q_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj\.weight, .*are not in its \*\.safetensors"):
        load_model(str(tmp_path))


def test_the_vocabulary_is_that_of_the_config():
    assert tiny("llama").get_input_embeddings().num_embeddings == VOCAB
