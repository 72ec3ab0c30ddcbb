"""What is changed of a model before it trains, through whole runs."""

import copy
from pathlib import Path

import pytest
import torch
from train.saved import saved_tensors
from train.tiny_dataset import WORDS, write_dataset
from train.tiny_models import VOCAB, tiny

from llmt_shared.errors import ConfigError
from llmt_train import checkpoints
from llmt_train.config import RunConfig
from llmt_train.export import export
from llmt_train.fit import fit
from llmt_train.model.adapt import resize_embeddings
from llmt_train.model.load import load_model
from llmt_train.watch.metrics import read_metrics

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 32}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


def run(data: Path, output: Path, train: dict | None = None, **changes) -> dict[str, torch.Tensor]:
    """Train; return the weights of the last checkpoint."""
    settings = {
        "task": "pretrain", "model": {"from_config": LLAMA}, "data": data, "output": output,
        "batch": {"tokens": 80, "micro_rows": 2}, "train": {"steps": 4} | (train or {}), "optim": {"lr": 1e-2},
    }  # fmt: skip
    result = fit(RunConfig.model_validate(settings | changes))
    return saved_tensors(Path(result.checkpoint), "model.")


def curve(output: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(output) if "loss" in record]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "phi"])  # phi's head has a bias
def test_rows_are_added_at_the_mean_and_those_there_stay(family, tied):
    model = tiny(family, tie_word_embeddings=tied)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    resize_embeddings(model, VOCAB + 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.vocab_size == VOCAB + 5
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (VOCAB + 5, 64)
    for name, tensor in before.items():
        found = model.state_dict()[name]
        assert torch.equal(found[: len(tensor)], tensor)
        for row in found[len(tensor) :]:
            torch.testing.assert_close(row, tensor.mean(0), rtol=2**-8, atol=1e-9)


def test_a_model_with_rows_enough_stays_as_it_is():
    model = tiny("llama")
    resize_embeddings(model, VOCAB - 5)
    assert model.get_input_embeddings().weight.shape[0] == VOCAB


def test_a_model_for_fewer_tokens_is_refused_or_resized_and_exported(data, tmp_path):
    load_model({"from_config": LLAMA | {"vocab_size": WORDS - 3}}).save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"`train.resize_embeddings: true` gives the model the rows"):
        run(data, tmp_path / "refused", model=model)
    weights = run(data, tmp_path / "run", {"resize_embeddings": True}, model=model)
    assert weights["model.embed_tokens.weight"].shape[0] == WORDS
    assert export(tmp_path / "run", tmp_path / "out", check=True).largest_difference <= 1e-5


def test_adapters_of_a_resized_model_are_exported_with_its_rows(data, tmp_path):
    load_model({"from_config": LLAMA | {"vocab_size": WORDS - 3}}).save_pretrained(tmp_path / "model")
    run(data, tmp_path / "run", {"resize_embeddings": True}, model=str(tmp_path / "model"), lora={"rank": 2})
    assert export(tmp_path / "run", tmp_path / "out", check=True).largest_difference <= 1e-5


def test_frozen_weights_keep_their_bits_and_the_others_learn(data, tmp_path):
    weights = run(data, tmp_path / "run", {"freeze": ["mlp", "embed_tokens"]})
    begun = load_model({"from_config": LLAMA | {"vocab_size": WORDS}}, seed=42).state_dict()
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor, begun[name])}
    assert moved == {name for name in weights if "mlp" not in name and "embed_tokens" not in name}


@pytest.mark.parametrize("checkpointing", ["attention", {"policy": "selective", "every": 2}, "full"])
def test_checkpointing_changes_no_bit_of_a_run(data, tmp_path, checkpointing):
    run(data, tmp_path / "plain")
    run(data, tmp_path / "recomputed", {"checkpointing": checkpointing})
    assert curve(tmp_path / "recomputed") == curve(tmp_path / "plain")


def test_weights_state_and_export_are_bf16_where_that_is_wanted(data, tmp_path):
    weights = run(data, tmp_path / "run", {"steps": 12}, precision="bf16-true")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    checkpoint = checkpoints.find_checkpoint(tmp_path / "run")
    state = saved_tensors(checkpoint, "optimizer.")
    assert {tensor.dtype for name, tensor in state.items() if name.endswith("exp_avg")} == {torch.bfloat16}
    assert curve(tmp_path / "run")[-1] < 0.95 * curve(tmp_path / "run")[0]
    export(tmp_path / "run", tmp_path / "out", check=True)
    exported = load_model(str(tmp_path / "out"), dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())


def test_bf16_true_is_near_fp32(data, tmp_path):
    run(data, tmp_path / "half", precision="bf16-true")
    run(data, tmp_path / "whole", precision="fp32")
    assert curve(tmp_path / "half") == pytest.approx(curve(tmp_path / "whole"), rel=2e-2)


def test_liger_without_a_gpu_is_refused_before_the_first_step(data, tmp_path):
    with pytest.raises(ConfigError, match=r"train.liger: needs a CUDA device"):
        run(data, tmp_path / "run", {"liger": True})


ERNIE = {**LLAMA, "model_type": "ernie4_5_moe", "num_key_value_heads": 2, "moe_intermediate_size": 16,
         "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0}  # fmt: skip
TWO_DTYPES = {
    "adapters beside norms": {"lora": {"rank": 4, "train_also": ["norm", "embed"]}},
    "routers in fp32": {"model": {"from_config": ERNIE}},  # the family wants them so
}


@pytest.mark.parametrize("changes", TWO_DTYPES.values(), ids=TWO_DTYPES)
def test_a_layer_may_train_in_two_dtypes(data, tmp_path, changes):
    weights = run(data, tmp_path / "half", precision="bf16-true", **changes)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16, torch.float32}
    run(data, tmp_path / "whole", precision="fp32", **changes)
    assert curve(tmp_path / "half") == pytest.approx(curve(tmp_path / "whole"), rel=2e-2)
    run(data, tmp_path / "again", {"checkpointing": "full"}, precision="bf16-true", **changes)
    assert curve(tmp_path / "again") == curve(tmp_path / "half")
    with pytest.raises(ConfigError, match=r"checkpointing: selective cannot .* another dtype .* wanted full"):
        run(data, tmp_path / "refused", {"checkpointing": "selective"}, precision="bf16-true", **changes)
