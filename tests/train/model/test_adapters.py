"""Adapters against their formula; what trains, what is saved, what is exported; and the reference that they leave."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import small_datasets
import torch
from train.interrupted import curve
from train.saved import saved_tensors
from train.tiny_dataset import WORDS, write_dataset
from train.tiny_models import packed, tiny
from transformers import AutoModelForCausalLM

from llmt_shared.errors import ConfigError
from llmt_train import checkpoints
from llmt_train.checkpoints.training import state_of
from llmt_train.config import LoraConfig, RunConfig
from llmt_train.export import export
from llmt_train.fit import fit
from llmt_train.model.adapters import add_adapters, merge_adapters, without_adapters
from llmt_train.model.load import load_model
from llmt_train.precompute import precompute
from llmt_train.validate import validate
from llmt_train.watch.metrics import read_metrics

LORA = LoraConfig(rank=4, alpha=6.0)


def logits_of(model, batch=None):
    batch = packed([[20, 4], [7]], 24) if batch is None else batch
    return model(input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments()).logits


def adapted(family="llama", config=LORA, dtype=torch.float64, **keys):
    """A model with adapters that do something: their second matrix is no longer 0."""
    model = tiny(family, dtype=dtype, **keys)
    add_adapters(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)  # adapters are fp32 by themselves
        if ".lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype) / 10
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_fresh_adapters_leave_the_model_as_it_was(family):
    model = tiny(family).eval()
    before = logits_of(model)
    add_adapters(model, LORA, seed=1)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize(("rank_stabilised", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_an_adapted_layer_computes_the_formula(rank_stabilised, scale):
    """Hu et al. 2021, equation 3; Kalajdzievski 2023 for the other scale."""
    layer = adapted(config=LORA.model_copy(update={"rank_stabilised": rank_stabilised})).model.layers[1].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), x @ (layer.weight + scale * up @ down).T, rtol=1e-12, atol=1e-12)


def test_all_linear_layers_but_the_head_get_an_adapter():
    model = adapted()
    linear = {name for name, module in tiny("llama").named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.split(".lora_")[0] for name in state_of(model, trained_alone=True)} == linear - {"lm_head"}


def test_only_the_targets_get_an_adapter_and_only_adapters_train():
    model = adapted(config=LORA.model_copy(update={"targets": ("q_proj", "v_proj")}))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * 2
    assert all(".q_proj.lora_" in name or ".v_proj.lora_" in name for name in names)


def test_parameters_of_the_model_train_too_where_that_is_wanted():
    model = adapted(config=LORA.model_copy(update={"train_also": (r"embed_tokens", r"layers\.1\..*layernorm")}))
    others = [name for name in state_of(model, trained_alone=True) if ".lora_" not in name]
    assert others == [
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ]


def test_adapters_are_fp32_beside_a_bf16_model():
    model = tiny("llama", dtype=torch.bfloat16)
    add_adapters(model, LORA, seed=1)
    assert {tensor.dtype for tensor in state_of(model, trained_alone=True).values()} == {torch.float32}
    logits_of(model).float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_drawn_adapters_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (tiny("llama") for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        add_adapters(model, LORA, seed=seed)
    states = [state_of(model, trained_alone=True) for model in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_merged_adapters_give_the_same_logits_and_leave_no_trace(family):
    model = adapted(family).eval()
    wanted = logits_of(model)
    merge_adapters(model)
    torch.testing.assert_close(logits_of(model), wanted, rtol=0, atol=1e-12)
    assert model.state_dict().keys() == tiny(family).state_dict().keys()


def test_without_adapters_there_is_the_model_alone():
    model = adapted().eval()
    with_them = logits_of(model)
    with without_adapters(model):
        assert torch.equal(logits_of(model), logits_of(tiny("llama", dtype=torch.float64).eval()))
    assert torch.equal(logits_of(model), with_them)
    assert not torch.equal(with_them, logits_of(tiny("llama", dtype=torch.float64).eval()))


def test_a_target_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ConfigError, match=r"no linear layer 'qproj'; it has down_proj, gate_proj, k_proj"):
        add_adapters(tiny("llama"), LORA.model_copy(update={"targets": ("q_proj", "qproj")}), seed=0)


def test_an_output_layer_that_is_the_embedding_too_takes_no_adapter():
    """Merged, its update would change the embedding as well."""
    config = LORA.model_copy(update={"targets": ("q_proj", "lm_head")})
    with pytest.raises(ConfigError, match=r"lora\.targets: 'lm_head' has the weights of the embedding"):
        add_adapters(tiny("llama", tie_word_embeddings=True), config, seed=0)
    model = adapted(config=config).eval()
    wanted = logits_of(model)
    merge_adapters(model)
    torch.testing.assert_close(logits_of(model), wanted, rtol=0, atol=1e-12)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'llmt\[peft\]'"):
        add_adapters(tiny("llama"), LORA, seed=0)


LLAMA = {"model_type": "llama", "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}  # fmt: skip


def save_model(folder: Path, seed: int = 0, **keys) -> Path:
    load_model({"from_config": LLAMA | keys}, seed=seed).save_pretrained(folder)
    return folder


def make_config(folder: Path, **changes) -> RunConfig:
    data = folder / "data"
    if not data.exists():
        write_dataset(data)
        save_model(folder / "model", initializer_range=0.2)
    run = {
        "task": "pretrain", "model": str(folder / "model"), "data": str(data), "output": str(folder / "run"),
        "batch": {"tokens": 80, "micro_rows": 2}, "train": {"steps": 16}, "save": {"every": 3},
        "optim": {"lr": 3e-2}, "lora": {"rank": 4, "dropout": 0.1},
    }  # fmt: skip
    return RunConfig.model_validate(run | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a model and a run of adapters on it."""
    folder = tmp_path_factory.mktemp("lora")
    fit(make_config(folder))
    return folder


def test_adapters_learn_and_a_checkpoint_holds_them_alone(trained):
    losses = [record["loss"] for record in read_metrics(trained / "run") if "loss" in record]
    assert losses[-1] < 0.95 * losses[0]
    checkpoint = checkpoints.find_checkpoint(trained / "run")
    state = saved_tensors(checkpoint)
    assert state
    assert all(".lora_" in name for name in state)


def test_adapters_resume_bit_for_bit(trained, tmp_path):
    shutil.copytree(trained / "data", tmp_path / "data")
    shutil.copytree(trained / "model", tmp_path / "model")
    fit(make_config(tmp_path, train={"steps": 5}, optim={"lr": 3e-2, "schedule": "constant"}))
    fit(make_config(tmp_path, optim={"lr": 3e-2, "schedule": "constant"}))
    whole = make_config(trained, output=str(tmp_path / "whole"), optim={"lr": 3e-2, "schedule": "constant"})
    fit(whole)
    run, whole = ([r for r in curve(tmp_path / name) if "loss" in r] for name in ("run", "whole"))
    assert run == whole


def test_adapters_of_other_weights_are_not_resumed_nor_exported(tmp_path):
    fit(make_config(tmp_path, train={"steps": 1}))
    save_model(tmp_path / "model", seed=1)
    with pytest.raises(ConfigError, match=r"weights that the run began with: '[0-9a-f]{16}' in the checkpoint"):
        fit(make_config(tmp_path, train={"steps": 2}))
    with pytest.raises(ConfigError, match="belong to other weights than"):
        export(tmp_path / "run", tmp_path / "out")


def test_a_live_reference_is_not_taken_from_other_weights_than_the_run_began_with(tmp_path):
    """They are in no checkpoint: a resumed run and `validate` take them from where the model was loaded."""
    data = small_datasets.build_chats(tmp_path, "preference")
    save_model(tmp_path / "model", vocab_size=1000)
    changes = {"task": "dpo", "model": str(tmp_path / "model"), "data": str(data), "lora": None,
               "batch": {"tokens": 800, "micro_rows": 2}}  # fmt: skip
    fit(make_config(tmp_path, **changes, train={"steps": 1}))
    assert validate(tmp_path / "run").eval["pairs"] > 0
    save_model(tmp_path / "model", seed=1, vocab_size=1000)
    with pytest.raises(ConfigError, match=r"weights that the run began with: '[0-9a-f]{16}' in the checkpoint"):
        fit(make_config(tmp_path, **changes, train={"steps": 2}))
    with pytest.raises(ConfigError, match=r"its reference had other weights than .*model has now"):
        validate(tmp_path / "run")


def test_the_merged_export_has_the_logits_of_the_run_in_plain_transformers(trained, tmp_path):
    result = export(trained / "run", tmp_path / "merged", check=True)
    assert result.largest_difference <= 1e-5
    merged, base = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "merged", trained / "model"))
    assert merged.state_dict().keys() == base.state_dict().keys()
    names = [name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])]
    assert names
    assert all("proj" in name for name in names)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_exported_adapters_are_those_that_peft_reads(trained, tmp_path):
    from peft import PeftModel

    export(trained / "run", tmp_path / "adapter", adapter=True, check=True)
    export(trained / "run", tmp_path / "merged")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (trained / "model", tmp_path / "merged"))
    ids = torch.arange(12)[None]
    wanted = merged.eval()(input_ids=ids).logits
    found = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_what_is_more_than_adapters_is_not_exported_as_adapters(tmp_path):
    fit(make_config(tmp_path, train={"steps": 1}, lora={"rank": 2, "train_also": ["norm"]}))
    with pytest.raises(ConfigError, match="more than adapters"):
        export(tmp_path / "run", tmp_path / "out", adapter=True)
    assert export(tmp_path / "run", tmp_path / "out", check=True).largest_difference <= 1e-5


def test_a_run_without_adapters_has_none_to_export(tmp_path):
    fit(make_config(tmp_path, train={"steps": 1}, lora=None))
    with pytest.raises(ConfigError, match="no adapters"):
        export(tmp_path / "run", tmp_path / "out", adapter=True)


def test_the_reference_of_dpo_is_the_model_without_its_adapters(tmp_path):
    """At step 0 the loss is ln 2; later it is that of a run whose reference was computed beforehand."""
    data = small_datasets.build_chats(tmp_path, "preference")
    model = save_model(tmp_path / "model", vocab_size=1000, initializer_range=0.2)
    changes = {"task": "dpo", "model": str(model), "data": str(data), "batch": {"tokens": 800, "micro_rows": 2}}
    live = make_config(tmp_path, **changes, output=str(tmp_path / "live"))
    stored = make_config(tmp_path, **changes, output=str(tmp_path / "stored"), dpo={"reference": "precomputed"})
    precompute(stored)
    for config in (live, stored):
        fit(config)
    curves = [[r["loss"] for r in read_metrics(c.output) if "loss" in r] for c in (live, stored)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    evaluations = [r["eval"]["loss"] for r in read_metrics(live.output) if "eval" in r]
    assert evaluations[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(curves[0][-1] - math.log(2)) > 0.01  # adapters do something by then
