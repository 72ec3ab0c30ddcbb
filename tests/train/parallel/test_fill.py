"""Weights of sharded models: those of one process, for every layout; the digest of them too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from train.model.test_fill import KEYS, spec_of, split, split_names, written
from train.parallel.ranks import on_ranks
from train.tiny_models import packed

from llmt_train.model.adapt import add_rows, resize_embeddings
from llmt_train.model.fill import fill, local_box, local_part, materialise, same_name
from llmt_train.model.load import load_model, load_skeleton
from llmt_train.parallel.layout import Layout
from llmt_train.parallel.mesh import build_mesh
from llmt_train.reference import fingerprint

BY_ROWS = ("embed_tokens", "lm_head", "q_proj.", "k_proj.", "v_proj.", "gate_proj.", "up_proj.", "qkv_proj.")
BY_COLUMNS = ("o_proj", "down_proj")
TWO = [Layout(1, 2, 1, 1), Layout(1, 1, 1, 2), Layout(2, 1, 1, 1)]
FOUR = [Layout(1, 4, 1, 1), Layout(1, 2, 1, 2), Layout(2, 2, 1, 1), Layout(2, 1, 1, 2), Layout(1, 2, 2, 1)]
SEGMENTS = packed([[10]], 10).segments()
MORE_ROWS = 103
"""More than the 97 that the models have; not even on 2 or 4."""
EXPERTS = {"from_config": {"model_type": "mixtral", **KEYS["mixtral"][1], "num_local_experts": 2}}
"""Fewer than 4 processes: some hold nothing of them."""


def _shard(model: nn.Module, layout: Layout) -> None:
    """Cut the layers over tp, then everything over what is left: what `parallel` does, in short."""
    mesh = build_mesh(layout, "cpu")
    done: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)) if layout.tp > 1 else ():
        if id(parameter) not in done:
            by_rows, by_columns = (any(each in name for each in group) for group in (BY_ROWS, BY_COLUMNS))
            placement = Shard(0) if by_rows else Shard(1) if by_columns else Replicate()
            cut = distribute_tensor(parameter.detach(), mesh.parameters["tp"], [placement], src_data_rank=None)
            done[id(parameter)] = nn.Parameter(cut)
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, done[id(parameter)])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh.fsdp)
    fully_shard(model, mesh=mesh.fsdp)


def _filled(spec: Any, layout: Layout, is_split: bool, num_rows: int | None = None) -> Any:
    model = load_skeleton(spec)
    before = None if num_rows is None else add_rows(model, num_rows)
    if is_split:
        split(model)
    _shard(model, layout)
    materialise(model, "cpu")
    fill(model, spec, seed=7, num_rows=before, where=split_names if is_split else same_name)
    return model


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def _differences(
    specs: list[Any], layouts: list[Layout], is_split: bool = False, num_rows: int | None = None
) -> list[tuple[str, Layout]]:
    """What of sharded models is not as in one process."""
    found = []
    for spec in specs:
        plain = load_model(spec, seed=7)
        if num_rows is not None:
            resize_embeddings(plain, num_rows)
        wanted = _tensors(plain)
        for layout in layouts:
            model = _filled(spec, layout, is_split, num_rows)
            for name, tensor in _tensors(model).items():
                stored, rows = split_names(name) if is_split else (name, None)
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if not torch.equal(whole, wanted[stored] if rows is None else wanted[stored][rows]):
                    found.append((name, layout))
            if (model.lm_head.weight is model.model.embed_tokens.weight) != plain.config.tie_word_embeddings:
                found.append(("tied", layout))
            if layout.tp == 1 and not is_split and not torch.equal(_logits(model), _logits(plain)):
                found.append(("logits", layout))
            if fingerprint(model, split_names if is_split else same_name) != fingerprint(plain):
                found.append(("fingerprint", layout))
    return found


def _logits(model: Any) -> torch.Tensor:
    """That FSDP computes with what was written."""
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        return model(input_ids=tokens, position_ids=tokens, segments=SEGMENTS, use_cache=False).logits


def _misplaced(layouts: list[Layout]) -> list[tuple[str, Layout]]:
    """Parameters whose part torch would look for elsewhere."""
    found = []
    for layout in layouts:
        model = load_skeleton(EXPERTS)
        _shard(model, layout)
        for name, parameter in model.named_parameters():
            mesh, placements = parameter.device_mesh, parameter.placements
            shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
            box = local_box(parameter)
            is_same = [bounds.start for bounds in box] == list(offset) or local_part(parameter).numel() == 0
            if tuple(bounds.stop - bounds.start for bounds in box) != tuple(shape) or not is_same:
                found.append((name, layout))
    return found


@pytest.mark.parametrize(("world", "layouts"), [(2, TWO), (4, FOUR)])
def test_loaded_and_drawn_weights_are_those_of_one_process(world: int, layouts: list[Layout], tmp_path: Path):
    specs = [spec for case in ("llama", "gemma2") for spec in (written(case, tmp_path / case), spec_of(case))]
    assert on_ranks(world, _differences, specs, layouts) == [[]] * world


def test_parts_of_fused_layers_are_those_of_one_process(tmp_path: Path):
    specs = [written("phi3", tmp_path), spec_of("phi3")]
    assert on_ranks(2, _differences, specs, TWO, True) == [[]] * 2


def test_merged_experts_are_those_of_one_process(tmp_path: Path):
    """Also where there are fewer than processes, so that some hold nothing."""
    specs = [written("mixtral", tmp_path), EXPERTS]
    assert on_ranks(4, _differences, specs, [FOUR[0]]) == [[]] * 4


def test_new_rows_are_those_of_one_process(tmp_path: Path):
    specs = [written("llama", tmp_path), spec_of("llama, tied")]
    assert on_ranks(2, _differences, specs, TWO, False, MORE_ROWS) == [[]] * 2


def test_parts_lie_where_torch_says():
    assert on_ranks(4, _misplaced, FOUR) == [[]] * 4
