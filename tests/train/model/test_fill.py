"""Weights that are written part by part, against what transformers itself loads and draws."""

import json
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train.tiny_models import _COMMON, CONFIGS, VOCAB
from transformers import AutoConfig, AutoModelForCausalLM

from llmt_shared.errors import ConfigError
from llmt_train.attention import NAME
from llmt_train.model import weights
from llmt_train.model.draw import draw
from llmt_train.model.fill import fill, materialise
from llmt_train.model.load import load_model, load_skeleton

_MOE = {**_COMMON, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8, "factor": 8.0}
_ROPE = {"factor": 8.0, "original_max_position_embeddings": 32}
_LLAMA3 = {**_ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_DEEPSEEK = {
    **_MOE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
MODELS = {
    **{family: keys for family, keys in CONFIGS.items() if family not in ("llama4_text", "falcon")},  # refused
    "mixtral": {**_COMMON, "num_local_experts": 4},
    "qwen3_moe": {**_MOE, "num_experts": 4, "head_dim": 16},
    "gpt_oss": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
    "gpt_neox": {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"},
    "gemma3_text": {**_COMMON, "head_dim": 16, "sliding_window": 8, "rope_parameters": _GEMMA3_ROPE},
    "qwen2": _COMMON,
    "deepseek_v3": _DEEPSEEK,  # has a buffer that lies on disk, in fp32 always
}
KEYS = {
    **{family: (family, keys) for family, keys in MODELS.items()},
    "llama with llama3 rope": ("llama", {**_COMMON, "rope_parameters": {"rope_theta": 1e4, **_LLAMA3}}),
    "llama with yarn": ("llama", {**_COMMON, "rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", **_ROPE}}),
    "phi3 with longrope": ("phi3", {**_COMMON, "rope_parameters": {"rope_theta": 1e4, **_LONG},
                                    "original_max_position_embeddings": 32}),
    "llama, tied": ("llama", {**_COMMON, "tie_word_embeddings": True}),
    "gemma2, not tied": ("gemma2", {**MODELS["gemma2"], "tie_word_embeddings": False}),
}  # fmt: skip
EACH = pytest.mark.parametrize("case", KEYS)


def spec_of(case: str):
    model_type, keys = KEYS[case]
    return {"from_config": {"model_type": model_type, **keys}}


def tensors(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same(got, wanted):
    """The same names, dtypes and bits; the same tensors tied and kept in the state."""
    got_tensors, wanted_tensors = tensors(got), tensors(wanted)
    assert got_tensors.keys() == wanted_tensors.keys()
    assert got.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted_tensors.items():
        assert got_tensors[name].dtype == tensor.dtype, name
        assert torch.equal(got_tensors[name], tensor), name


def written(case: str, folder):
    """A model of transformers' own whose tensors all differ from how they begin, saved."""
    model_type, keys = KEYS[case]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=generator))
        for name in dict(model.named_buffers()).keys() & model.state_dict().keys():
            model.get_buffer(name).add_(0.3)
    model.save_pretrained(folder)
    return str(folder)


def rewrite(folder, change) -> None:
    """Change what lies on disk."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_folder_is_loaded_as_transformers_loads_it(case, dtype, tmp_path):
    folder = written(case, tmp_path)
    got = load_model(folder, dtype=dtype)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=NAME)
    assert_same(got, wanted)
    assert got.config.to_dict() == wanted.config.to_dict() | {"use_cache": False}
    assert got.generation_config.to_dict() == wanted.generation_config.to_dict()


@EACH
def test_drawn_weights_are_those_that_transformers_draws_for_the_whole_model(case):
    wanted = load_skeleton(spec_of(case)).to_empty(device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        wanted.initialize_weights()
    wanted.tie_weights()
    assert_same(load_model(spec_of(case), seed=5), wanted)


@EACH
def test_drawn_weights_have_the_spread_of_a_model_that_transformers_builds(case):
    model_type, keys = KEYS[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wanted = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys), attn_implementation=NAME)
    got = load_model(spec_of(case), seed=5)
    for name, buffer in wanted.named_buffers():
        assert torch.equal(got.get_buffer(name), buffer), name
    for name, parameter in wanted.named_parameters():
        found, spread = got.get_parameter(name).detach(), parameter.detach().std(correction=0)
        error = 4 * (spread + found.std(correction=0)) / parameter.numel() ** 0.5  # 4 deviations of a mean, about
        assert abs(found.mean() - parameter.detach().mean()) <= error, name
        assert abs(found.std(correction=0) - spread) <= error, name


def test_a_residual_layer_is_drawn_smaller_as_gpt2_wants_it():
    model = load_model(spec_of("gpt2"))
    for block in model.transformer.h:
        assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.attn.c_proj.weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.05)


def test_the_row_of_the_padding_is_zero_also_where_weights_are_tied():
    model = load_model(spec_of("llama, tied"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.lm_head.weight == 0).all(1).tolist() == [True] + [False] * (VOCAB - 1)


def test_no_more_than_a_layer_is_in_memory_while_weights_are_drawn():
    skeleton = load_skeleton(spec_of("llama"))
    largest = 0

    def take(name: str, tensor: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, sum(each.numel() for each in skeleton.parameters() if not each.is_meta))

    draw(skeleton, 0, take)
    layer = sum(parameter.numel() for parameter in skeleton.model.layers[0].parameters())
    assert largest == max(layer, VOCAB * 64)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_a_family_whose_layers_cannot_be_drawn_alone_is_drawn_whole(capsys):
    """Apertus' activation has parameters that its constructor sets, and no rule."""
    spec = {"from_config": {"model_type": "apertus", **_COMMON}}
    model = load_model(spec, seed=3)
    assert "note: transformers does not say how" in capsys.readouterr().err
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert_same(model, load_skeleton(spec, device="cpu"))


def test_experts_that_lie_one_by_one_are_merged(tmp_path):
    folder = written("mixtral", tmp_path)
    keys = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in keys  # what the family's files are like
    up = load_model(folder).model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(up[3, :96], keys["model.layers.0.block_sparse_moe.experts.3.w1.weight"])


@pytest.mark.parametrize("lost", ["experts.3.", "experts.3.w1."])
def test_experts_that_are_not_there_are_noticed(tmp_path, lost):
    folder = written("mixtral", tmp_path)
    rewrite(tmp_path, lambda state: {name: state[name] for name in state if f"1.block_sparse_moe.{lost}" not in name})
    with pytest.raises(ConfigError, match=f"model: {tmp_path}: "):
        load_model(folder)


def test_weights_in_several_files_are_found(tmp_path):
    written("llama", tmp_path / "one")
    model = load_model(str(tmp_path / "one"))
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert_same(load_model(str(tmp_path / "many")), model)


def test_weights_of_the_base_model_alone_are_found_under_its_names(tmp_path):
    """As of a tied model that was saved without its head."""
    written("llama, tied", tmp_path)
    wanted = load_model(str(tmp_path))
    wanted.model.save_pretrained(tmp_path / "base")
    assert "embed_tokens.weight" in load_file(tmp_path / "base" / "model.safetensors")
    assert_same(load_model(str(tmp_path / "base")), wanted)


def test_one_name_of_tied_weights_is_enough(tmp_path):
    written("llama, tied", tmp_path)
    wanted = load_model(str(tmp_path))
    rewrite(tmp_path, lambda state: {name.replace("model.embed_tokens", "lm_head"): state[name] for name in state})
    assert_same(load_model(str(tmp_path)), wanted)


def test_tied_weights_that_differ_are_refused(tmp_path):
    written("llama, tied", tmp_path)
    rewrite(tmp_path, lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1})
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight and lm_head\.weight are tied, but they differ"):
        load_model(str(tmp_path))


def test_tied_weights_that_lie_there_twice_are_loaded(tmp_path):
    written("llama, tied", tmp_path)
    wanted = load_model(str(tmp_path))
    rewrite(tmp_path, lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()})
    assert_same(load_model(str(tmp_path)), wanted)


def test_an_index_that_leaves_its_folder_is_refused(tmp_path):
    written("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    index = {"weight_map": {"lm_head.weight": "../part.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="names files outside the folder"):
        load_model(str(tmp_path))


def test_adapters_beside_a_model_are_not_ignored(tmp_path):
    folder = written("llama", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="it holds adapters beside the model"):
        load_model(folder)


def split_names(name: str):
    """Phi-3's fused layers as parts: 4 query heads and 2 key/value heads of 16 dims; two times 96."""
    rows = {"q": slice(0, 64), "k": slice(64, 96), "v": slice(96, 128), "gate": slice(0, 96), "up": slice(96, 192)}
    *parents, part, kind = name.split(".")
    return (".".join([*parents, kind]), rows[part]) if part in rows else (name, None)


class Parts(torch.nn.Module):
    """What stands for a fused layer."""

    def __init__(self, fused, names):
        super().__init__()
        for name in names:
            _, rows = split_names(f"{name}.weight")
            layer = torch.nn.Linear(fused.in_features, rows.stop - rows.start, False, device="meta")
            self.add_module(name, layer)


def split(model):
    for layer in model.model.layers:
        layer.self_attn.qkv_proj = Parts(layer.self_attn.qkv_proj, "qkv")
        layer.mlp.gate_up_proj = Parts(layer.mlp.gate_up_proj, ("gate", "up"))
    materialise(model, "cpu")
    return model


@pytest.mark.parametrize("is_drawn", [False, True], ids=["loaded", "drawn"])
def test_parts_of_a_fused_layer_are_its_rows(tmp_path, is_drawn):
    spec = spec_of("phi3") if is_drawn else written("phi3", tmp_path)
    whole, parts = load_model(spec, seed=2), split(load_skeleton(spec))
    fill(parts, spec, seed=2, where=split_names)
    for name, parameter in parts.named_parameters():
        stored, rows = split_names(name)
        assert torch.equal(parameter, whole.get_parameter(stored)[rows or slice(None)]), name


def test_parts_that_are_not_of_the_layer_on_disk_are_refused(tmp_path):
    folder = written("phi3", tmp_path)
    model = split(load_skeleton(folder))
    rewrite(tmp_path, lambda state: {name: t[:-1] if "qkv" in name else t for name, t in state.items()})
    with pytest.raises(ConfigError, match=r"qkv_proj\.weight is \[127, 64\] in \*\.safetensors, but \[128, 64\]"):
        fill(model, folder, where=split_names)


def test_what_is_not_the_models_own_is_left_alone(tmp_path):
    folder = written("llama", tmp_path)
    model = load_skeleton(folder)
    model.added = torch.nn.Linear(2, 3, device="meta")
    materialise(model, "cpu")
    torch.nn.init.constant_(model.added.weight, 7.0)
    fill(model, folder, where=lambda name: None if name.startswith("added.") else (name, None))
    assert (model.added.weight == 7).all()


def test_what_nothing_was_written_to_is_named():
    model = load_skeleton(spec_of("llama"))
    model.added = torch.nn.Linear(2, 3, device="meta")
    materialise(model, "cpu")
    with pytest.raises(ConfigError, match=r"does not say how added\.weight begins"):
        fill(model, spec_of("llama"))


def test_only_slices_are_read(tmp_path, monkeypatch):
    """Half of a model's rows: half of its bytes."""
    folder = written("llama", tmp_path)
    asked = []

    class Watched:
        def __init__(self, part):
            self.part, self.get_shape = part, part.get_shape

        def __getitem__(self, box):
            asked.append(self.part[box].numel())
            return self.part[box]

    class File:
        def __init__(self, *arguments, **options):
            self.file = safe_open(*arguments, **options)
            self.keys = self.file.keys

        def get_slice(self, key):
            return Watched(self.file.get_slice(key))

    monkeypatch.setattr(weights, "safe_open", File)
    monkeypatch.setattr("llmt_train.model.fill.local_box", half)
    monkeypatch.setattr("llmt_train.model.fill.local_part", lambda tensor: tensor[half(tensor)])
    model = load_skeleton(folder)
    materialise(model, "cpu")
    fill(model, folder)
    wanted = sum(parameter[half(parameter)].numel() for parameter in model.parameters())
    assert sum(asked) == wanted < 0.52 * sum(parameter.numel() for parameter in model.parameters())


def half(tensor):
    return (slice(0, (len(tensor) + 1) // 2), *(slice(0, size) for size in tensor.shape[1:]))


def test_torch_random_numbers_are_left_as_they_were(tmp_path):
    folder = written("gemma2", tmp_path)
    before = torch.get_rng_state()
    for spec in (folder, spec_of("gemma2"), {"from_config": {"model_type": "apertus", **_COMMON}}):
        load_model(spec)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_hub_id_is_read_from_the_cache(tmp_path, monkeypatch):
    import huggingface_hub

    commit = "0" * 40
    folder = tmp_path / "models--someone--tiny"
    written("llama", folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(weights, "snapshot_download", partial(huggingface_hub.snapshot_download, cache_dir=tmp_path))
    config = AutoConfig.from_pretrained(folder / "snapshots" / commit)
    monkeypatch.setattr("llmt_train.model.skeleton._read_config", lambda name: config)
    assert_same(load_model("someone/tiny"), load_model(str(folder / "snapshots" / commit)))
