"""Tensors are read as they were written, on any layout, and nothing that is read can run code."""

import errno
import json
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from train.parallel.ranks import on_ranks
from train.saved import read_whole

from llmt_shared.errors import FormatError
from llmt_train.checkpoints import sharded

SHAPES = {"matrix": (8, 12), "uneven": (7, 5), "thin": (1, 3), "vector": (5,), "scalar": (), "empty": (0, 4)}
DTYPES = {"matrix": torch.float32, "uneven": torch.bfloat16, "thin": torch.float64, "vector": torch.int64}


def whole_tensors() -> dict[str, torch.Tensor]:
    """The same on every rank and call."""
    draw = torch.Generator().manual_seed(5)
    return {name: (100 * torch.randn(shape, generator=draw)).to(DTYPES.get(name, torch.float32))
            for name, shape in SHAPES.items()}  # fmt: skip


def laid_out(layout: str) -> dict[str, torch.Tensor]:
    """The tensors on a layout: `plain`, `dp`, `tp` or `dp x tp`, with rows and columns split by tp."""
    tensors = whole_tensors()
    if layout == "plain":
        return tensors
    size = dist.get_world_size()
    shape = {"dp": (size, 1), "tp": (1, size), "dp x tp": (2, size // 2)}[layout]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("shard", "tp"))
    return {name: place(tensor, mesh, int(name == "matrix")) for name, tensor in tensors.items()}


def place(tensor: torch.Tensor, mesh: object, tp_dim: int) -> DTensor:
    if tensor.ndim < 2:
        return distribute_tensor(tensor, mesh, [Replicate(), Replicate()])
    return distribute_tensor(tensor, mesh, [Shard(0), Shard(tp_dim) if tp_dim else Replicate()])


def write_here(folder: Path, layout: str) -> None:
    sharded.write(folder, laid_out(layout))


def read_here(folder: Path, layout: str) -> None:
    """Every bit is what it was; what is not asked for is left."""
    tensors = {name: torch.zeros_like(tensor) for name, tensor in laid_out(layout).items() if name != "vector"}
    sharded.read(folder, tensors)
    for name, tensor in tensors.items():
        found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(found, whole_tensors()[name]), name


@pytest.mark.parametrize(("world", "layout"), [(1, "plain"), (2, "dp"), (2, "tp"), (4, "dp x tp")])
def test_what_any_layout_writes_any_layout_reads(tmp_path: Path, world: int, layout: str) -> None:
    if world == 1:
        write_here(tmp_path, layout)
    else:
        on_ranks(world, write_here, tmp_path, layout)
    read_here(tmp_path, "plain")
    on_ranks(2, read_here, tmp_path, "tp")
    on_ranks(4, read_here, tmp_path, "dp")
    assert all(torch.equal(read_whole(tmp_path, name), tensor) for name, tensor in whole_tensors().items())


def write_and_name(folder: Path) -> list[str]:
    return [path.name for path in sharded.write(folder, laid_out("dp"))]


def test_every_file_is_some_ranks_and_no_part_is_written_twice(tmp_path: Path) -> None:
    first, second = on_ranks(2, write_and_name, tmp_path)
    assert not set(first) & set(second)
    assert {*first, *second} == {path.name for path in tmp_path.iterdir()}
    for stored in sharded.read_index(tmp_path).tensors.values():
        assert len({part.offsets for part in stored.parts}) == len(stored.parts)


def test_the_index_says_what_there_is(tmp_path: Path) -> None:
    sharded.write(tmp_path, whole_tensors())
    index = sharded.read_index(tmp_path)
    assert {name: stored.shape for name, stored in index.tensors.items()} == SHAPES
    assert index.tensors["uneven"].torch_dtype == torch.bfloat16


def test_torchs_own_tools_read_it_too(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).view(3, 4)}
    sharded.write(tmp_path, tensors)
    found = {"a": torch.zeros(3, 4)}
    with pytest.warns(UserWarning, match="single process"):
        torch.distributed.checkpoint.load(found, checkpoint_id=tmp_path)
    assert torch.equal(found["a"], tensors["a"])


def test_what_is_held_may_change_before_it_is_written(tmp_path: Path) -> None:
    tensor = torch.arange(5.0)
    writing = sharded.Writing(tmp_path, {"a": tensor})
    writing.hold()
    tensor.zero_()
    writing.finish()
    assert read_whole(tmp_path, "a").tolist() == [0, 1, 2, 3, 4]


def test_another_dtype_is_converted(tmp_path: Path) -> None:
    sharded.write(tmp_path, {"a": torch.tensor([1.0, 2.0])})
    half = torch.zeros(2, dtype=torch.bfloat16)
    sharded.read(tmp_path, {"a": half})
    assert half.tolist() == [1, 2]


def test_what_is_not_there_or_has_another_shape_is_named(tmp_path: Path) -> None:
    sharded.write(tmp_path, {"a.weight": torch.zeros(2, 3)})
    with pytest.raises(FormatError, match=r"holds no b\.weight"):
        sharded.read(tmp_path, {"b.weight": torch.zeros(1)})
    with pytest.raises(FormatError, match=r"holds no b\.weight"):
        read_whole(tmp_path, "b.weight")
    with pytest.raises(FormatError, match=r"a\.weight is \[2, 3\]; wanted \[3, 2\]"):
        sharded.read(tmp_path, {"a.weight": torch.zeros(3, 2)})


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


def test_a_trap_in_place_of_a_tensor_is_refused_and_not_sprung(tmp_path: Path) -> None:
    folder, sprung = tmp_path / "tensors", tmp_path / "sprung"
    sharded.write(folder, {"a": torch.zeros(100)})
    [file] = folder.glob("*.distcp")
    torch.save(Trap(sprung), file)
    content = json.loads((folder / sharded.INDEX).read_text())
    content["tensors"]["a"]["parts"][0][-1] = file.stat().st_size
    (folder / sharded.INDEX).write_text(json.dumps(content))
    with pytest.raises(FormatError, match="something else than tensors"):
        sharded.read(folder, {"a": torch.zeros(100)})
    assert not sprung.exists()
    torch.load(file, weights_only=False)
    assert sprung.exists()  # it is a trap


def test_a_trap_in_torchs_own_index_is_never_touched(tmp_path: Path) -> None:
    folder, sprung = tmp_path / "tensors", tmp_path / "sprung"
    sharded.write(folder, {"a": torch.ones(3)})
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(sprung)))
    assert read_whole(folder, "a").tolist() == [1, 1, 1]
    assert not sprung.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert sprung.exists()  # it is a trap


def test_a_pickle_in_place_of_the_index_is_refused_and_not_sprung(tmp_path: Path) -> None:
    sharded.write(tmp_path / "tensors", {"a": torch.ones(3)})
    (tmp_path / "tensors" / sharded.INDEX).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(FormatError, match=r"index\.json"):
        read_whole(tmp_path / "tensors", "a")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "part",
    [
        [[0], [3], "../elsewhere", 0, 10],  # another folder's file
        [[0], [2], "FILE", 0, 10],  # a part is missing
        [[1], [3], "FILE", 0, 10],  # outside the tensor
        [[0, 0], [3, 1], "FILE", 0, 10],  # other dims
        [[0], [3], "FILE", -1, 10],
    ],
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, part: list) -> None:
    sharded.write(tmp_path, {"a": torch.ones(3)})
    content = json.loads((tmp_path / sharded.INDEX).read_text())
    file = content["tensors"]["a"]["parts"][0][2]
    content["tensors"]["a"]["parts"] = [[file if value == "FILE" else value for value in part]]
    (tmp_path / sharded.INDEX).write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"index\.json"):
        sharded.read_index(tmp_path)


def test_a_file_that_is_gone_or_cut_is_a_format_error(tmp_path: Path) -> None:
    sharded.write(tmp_path, {"a": torch.ones(300)})
    [file] = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(FormatError, match="cannot be read"):
        read_whole(tmp_path, "a")
    file.unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        read_whole(tmp_path, "a")


def write_on_a_full_disk(folder: Path) -> tuple[int | None, str]:
    """The second rank's files may not grow beyond some bytes."""
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    mesh = init_device_mesh("cpu", (2,))
    try:
        sharded.write(folder, {"a": distribute_tensor(torch.zeros(100_000), mesh, [Shard(0)])})
    except OSError as error:
        return error.errno, str(error)
    raise AssertionError("no error")


def test_a_full_disk_of_one_rank_is_told_on_all(tmp_path: Path) -> None:
    for number, text in on_ranks(2, write_on_a_full_disk, tmp_path):
        assert number == errno.EFBIG
        assert "(rank 1 on " in text
