"""What is written one tensor after the other is what transformers would have written at once."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train import tiny_models
from train.tiny_models import VOCAB, tiny
from transformers import AutoModelForCausalLM

from llmt_shared.errors import FormatError
from llmt_train.model.disk import Piece, on_disk, pieces_of, write_files
from llmt_train.model.fused import split_fused

_EXPERTS = {"num_experts_per_tok": 2}
CONFIGS = {
    "gpt_neox": {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                 "num_attention_heads": 4},
    "mixtral": tiny_models.CONFIGS["llama"] | _EXPERTS | {"num_local_experts": 3},
    "qwen3_moe": tiny_models.CONFIGS["qwen3"] | _EXPERTS | {"num_experts": 3, "moe_intermediate_size": 24},
}  # fmt: skip
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "gpt2", "gpt_neox", "phi3", "mixtral", "qwen3_moe"]


@pytest.fixture(autouse=True)
def more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in CONFIGS.items():
        monkeypatch.setitem(tiny_models.CONFIGS, name, config)


def skeleton_of(model: torch.nn.Module) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config)


def write(model: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.float32, max_shard: int = 10**9) -> None:
    """As a checkpoint of this model would be exported."""
    folder.mkdir()
    skeleton = skeleton_of(model)
    split_fused(model)
    own = dict(model.named_parameters())
    pieces = pieces_of(skeleton, {name: tensor.shape for name, tensor in own.items()}, dtype)
    assert pieces is not None

    def read(piece: Piece) -> dict[str, torch.Tensor]:
        tensor = own[piece.parts[0]] if len(piece.parts) == 1 else torch.cat([own[part] for part in piece.parts])
        return on_disk(skeleton, piece.name, tensor.detach().to(dtype))

    write_files(folder, pieces, read, max_shard)


def load(folder: Path) -> dict[str, torch.Tensor]:
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    assert len({name for file in files for name in file}) == sum(map(len, files))
    return {name: tensor for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_hold_what_transformers_writes(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "whole")
    write(model, tmp_path / "streamed")
    found, wanted = load(tmp_path / "streamed"), load(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_several_files_have_an_index_and_are_no_larger_than_wanted(tmp_path: Path, family: str) -> None:
    model, limit = tiny(family), 20_000
    model.save_pretrained(tmp_path / "whole", max_shard_size=limit)
    write(model, tmp_path / "streamed", max_shard=limit)
    found, wanted = (json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
                     for name in ("streamed", "whole"))  # fmt: skip
    assert found["metadata"] == wanted["metadata"]
    assert found["weight_map"].keys() == wanted["weight_map"].keys()
    files = {path.name: load_file(path) for path in (tmp_path / "streamed").glob("*.safetensors")}
    assert found["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    for tensors in files.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    model.config.save_pretrained(tmp_path / "streamed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_only_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    model = tiny("mixtral")
    skeleton = skeleton_of(model)
    pieces = pieces_of(skeleton, {name: tensor.shape for name, tensor in model.named_parameters()}, torch.float32)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    seen = []

    def read(piece: Piece) -> dict[str, torch.Tensor]:
        assert not alive, "what was read before is still there"
        tensors = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in piece.files.items()}
        for tensor in tensors.values():
            alive.add(tensor)
        seen.append(piece.name)
        return tensors

    write_files(tmp_path, pieces, read, 20_000)
    assert {*seen} == {piece.name for piece in pieces}


def test_weights_may_be_written_in_another_precision(tmp_path: Path) -> None:
    model = tiny("llama")
    write(model, tmp_path / "half", torch.bfloat16)
    assert all(torch.equal(tensor, model.get_parameter(name).bfloat16())
               for name, tensor in load(tmp_path / "half").items())  # fmt: skip


def test_weights_of_another_model_are_named() -> None:
    model = tiny("llama")
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    skeleton = skeleton_of(model)
    with pytest.raises(FormatError, match=r"do not fit config\.json: model\.norm\.weight is None; wanted \(\d+,\)"):
        pieces_of(
            skeleton, {name: shape for name, shape in shapes.items() if name != "model.norm.weight"}, torch.float32
        )
    with pytest.raises(FormatError, match=r"do not fit config\.json: model\.norm\.weight is \(3,\); wanted"):
        pieces_of(skeleton, shapes | {"model.norm.weight": (3,)}, torch.float32)


def test_a_tensor_in_files_that_is_made_of_several_cannot_be_written_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(model: object, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pair = [state.pop(name) for name in list(state) if "q_proj" in name or "k_proj" in name]
        return state | ({"qk": torch.cat(pair)} if pair else {})

    model = tiny("llama")
    monkeypatch.setattr("llmt_train.model.disk.revert_weight_conversion", joined)
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    assert pieces_of(skeleton_of(model), shapes, torch.float32) is None
