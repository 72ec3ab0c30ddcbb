"""A model and its optimizer go from any layout to any other, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from train.checkpoints.test_sharded import Trap
from train.parallel.ranks import on_ranks

from llmt_shared.errors import FormatError
from llmt_train import checkpoints
from llmt_train.checkpoints import training
from llmt_train.checkpoints.sharded import read_index
from llmt_train.config.optim import AdafactorConfig, AdamwConfig, MuonConfig, SgdConfig
from llmt_train.optim import build_optimizer
from llmt_train.parallel.layout import Layout
from llmt_train.parallel.mesh import build_mesh

LAYOUTS = {
    "dp2 x tp2": Layout(shard=2, tp=2), "dp4": Layout(shard=4), "tp2": Layout(tp=2),
    "hsdp": Layout(replicate=2),
}  # fmt: skip
OPTIMIZERS = {
    "adamw": AdamwConfig(optimizer="adamw", lr=0.1, weight_decay=0.1),
    "sgd": SgdConfig(optimizer="sgd", lr=0.1, momentum=0.9),
    "plain sgd": SgdConfig(optimizer="sgd", lr=0.1, momentum=0),
    "adafactor": AdafactorConfig(optimizer="adafactor", lr=0.1),
    "muon": MuonConfig(optimizer="muon", lr=0.1),
}


class Block(nn.Module):
    """The kinds of parameters that a model has; 7 rows are not divided evenly by 2 nor 4."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 7, bias=True)
        self.down = nn.Linear(7, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("counts", torch.randn(3))
        self.register_buffer("derived", torch.randn(3), persistent=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


SPLIT = {"embed.weight": 0, "up.weight": 0, "up.bias": 0, "down.weight": 1}
"""Dim of parameters that tp divides."""


def build(layout: str, seed: int = 0) -> Block:
    model = Block(seed)
    if layout == "plain":
        return model
    mesh = build_mesh(LAYOUTS[layout], "cpu")
    if mesh.layout.tp > 1:
        for name, parameter in list(model.named_parameters()):
            placement = Shard(SPLIT[name]) if name in SPLIT else Replicate()
            owner, _, last = name.rpartition(".")
            divided = nn.Parameter(distribute_tensor(parameter.detach(), mesh.parameters["tp"], [placement]))
            setattr(model.get_submodule(owner), last, divided)
        model.head.weight = model.embed.weight
    fully_shard(model, mesh=mesh.fsdp)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    """Steps with gradients that are the same on every layout."""
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = (parameter.detach() * 7 + 1).sin()
        optimizer.step()


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, NDArray]:
    """Every tensor of a training, by its name in a checkpoint."""
    tensors, _ = training.collect(model, [optimizer])
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: tensor.detach().numpy().copy() for name, tensor in full.items()}


def save_here(folder: Path, layout: str, name: str) -> dict[str, NDArray]:
    model = build(layout)
    optimizer = build_optimizer(model, OPTIMIZERS[name])
    train(model, optimizer)
    optimizer.param_groups[-1]["lr"] = 0.0625
    checkpoint = {"epoch": 3, "state_dict": {}, "optimizer_states": [], "loops": {"fit_loop": {}}}
    checkpoints.save_training(folder, checkpoints.take(checkpoint, model, [optimizer], trained_alone=False))
    return whole(model, optimizer)


def load_here(folder: Path, layout: str, name: str) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
    """What is loaded, and what one more step makes of it."""
    model = build(layout, seed=1)
    optimizer = build_optimizer(model, OPTIMIZERS[name])
    loaded = checkpoints.load_training(folder, model, [optimizer], trained_alone=False)
    assert (loaded["epoch"], loaded["loops"], loaded["optimizer_states"]) == (3, {"fit_loop": {}}, [])
    assert optimizer.param_groups[-1]["lr"] == 0.0625
    assert model.head.weight is model.embed.weight
    before = whole(model, optimizer)
    train(model, optimizer, steps=1)
    return before, whole(model, optimizer)


def run(layout: str, function: object, *arguments: object) -> object:
    """In one process without a group, or on as many ranks as a layout has; what the first one returns."""
    if layout == "plain":
        return function(*arguments)
    answers = on_ranks(LAYOUTS[layout].world, function, *arguments)
    for answer in answers[1:]:
        assert_equal(answer[0] if isinstance(answer, tuple) else answer,
                     answers[0][0] if isinstance(answer, tuple) else answers[0])  # fmt: skip
    return answers[0]


def assert_equal(found: dict[str, NDArray], wanted: dict[str, NDArray]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert np.array_equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_model_goes_to_the_disk_and_back(tmp_path: Path, name: str) -> None:
    saved = run("plain", save_here, tmp_path, "plain", name)
    assert_equal(run("plain", load_here, tmp_path, "plain", name)[0], saved)


@pytest.mark.parametrize(
    ("name", "layouts"),
    [("adamw", ["dp2 x tp2", "dp4", "tp2", "plain"]), ("muon", ["tp2", "plain"]), ("adafactor", ["tp2", "plain"])],
)
def test_two_by_two_devices_go_to_any_other_layout(tmp_path: Path, name: str, layouts: list[str]) -> None:
    saved = run("dp2 x tp2", save_here, tmp_path, "dp2 x tp2", name)
    stepped = {}
    for layout in layouts:
        loaded, stepped[layout] = run(layout, load_here, tmp_path, layout, name)
        assert_equal(loaded, saved)
    for layout in layouts:
        for key, tensor in stepped[layout].items():
            np.testing.assert_allclose(tensor, stepped["plain"][key], rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("layout", ["plain", "hsdp"])
def test_other_layouts_go_to_two_by_two_devices(tmp_path: Path, layout: str) -> None:
    saved = run(layout, save_here, tmp_path, layout, "adamw")
    assert_equal(run("dp2 x tp2", load_here, tmp_path, "dp2 x tp2", "adamw")[0], saved)


def test_a_step_after_loading_is_the_step_that_would_have_been(tmp_path: Path) -> None:
    save_here(tmp_path, "plain", "adamw")
    model = build("plain")
    optimizer = build_optimizer(model, OPTIMIZERS["adamw"])
    train(model, optimizer)
    optimizer.param_groups[-1]["lr"] = 0.0625
    train(model, optimizer, steps=1)
    assert_equal(load_here(tmp_path, "plain", "adamw")[1], whole(model, optimizer))


def test_names_are_the_models_own_and_tied_weights_are_there_once(tmp_path: Path) -> None:
    save_here(tmp_path, "plain", "adamw")
    names = read_index(tmp_path / checkpoints.TENSORS).tensors.keys()
    weights = {"embed.weight", "up.weight", "up.bias", "down.weight", "norm.weight", "norm.bias"}
    states = {f"optimizer.{name}.{key}" for name in weights for key in ("exp_avg", "exp_avg_sq", "step")}
    assert names == {f"model.{name}" for name in weights | {"counts"}} | states


def freeze_most(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("up"))
    return model


def test_what_does_not_train_may_be_left_out_and_is_left_as_it_is(tmp_path: Path) -> None:
    model = freeze_most(build("plain"))
    optimizer = build_optimizer(model, OPTIMIZERS["adamw"])
    train(model, optimizer)
    checkpoints.save_training(tmp_path, checkpoints.take({}, model, [optimizer], trained_alone=True))
    index = read_index(tmp_path / checkpoints.TENSORS)
    assert {name for name in index.tensors if name.startswith("model.")} == {"model.up.weight", "model.up.bias"}
    other = freeze_most(build("plain", seed=1))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    checkpoints.load_training(tmp_path, other, [build_optimizer(other, OPTIMIZERS["adamw"])], trained_alone=True)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name] if name.startswith("up") else before[name]), name


def test_a_checkpoint_of_another_model_or_optimizer_is_named(tmp_path: Path) -> None:
    save_here(tmp_path, "plain", "adamw")
    larger = build("plain")
    larger.more = nn.Linear(2, 2, bias=False)
    with pytest.raises(FormatError, match=r"of another model: it does not hold more\.weight"):
        checkpoints.load_training(tmp_path, larger, [], trained_alone=False)
    smaller = build("plain")
    del smaller.down
    with pytest.raises(FormatError, match=r"of another model: the run has no down\.weight"):
        checkpoints.load_training(tmp_path, smaller, [], trained_alone=False)
    model = build("plain")
    with pytest.raises(FormatError, match="the state of 1 optimizers; the run has 2"):
        checkpoints.load_training(tmp_path, model, [build_optimizer(model, OPTIMIZERS["muon"])], trained_alone=False)
    frozen = freeze_most(build("plain"))
    optimizer = build_optimizer(frozen, OPTIMIZERS["adamw"])
    with pytest.raises(FormatError, match="groups are of other parameters"):
        checkpoints.load_training(tmp_path, frozen, [optimizer], trained_alone=False)


def test_what_depends_on_the_machine_is_not_taken_from_a_checkpoint(tmp_path: Path) -> None:
    """A run on a GPU steps in one fused kernel; it may go on where there is none."""
    save_here(tmp_path, "plain", "adamw")
    content = torch.load(tmp_path / checkpoints.TRAINER, weights_only=True)
    content["optimizers"][0]["groups"][0]["fused"] = True
    torch.save(content, tmp_path / checkpoints.TRAINER)
    model = build("plain")
    optimizer = build_optimizer(model, OPTIMIZERS["adamw"])
    checkpoints.load_training(tmp_path, model, [optimizer], trained_alone=False)
    assert not optimizer.param_groups[0]["fused"]


def test_a_trap_in_the_trainers_data_is_refused_and_not_sprung(tmp_path: Path) -> None:
    torch.save({"epoch": 0, "trap": Trap(tmp_path / "sprung")}, tmp_path / checkpoints.TRAINER)
    with pytest.raises(FormatError, match="something else than tensors and plain data"):
        training.read_plain(tmp_path / checkpoints.TRAINER)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_trainers_data_that_are_damaged_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / checkpoints.TRAINER).write_bytes(content)
    with pytest.raises(FormatError, match=r"trainer\.pt: cannot be read"):
        training.read_plain(tmp_path / checkpoints.TRAINER)
