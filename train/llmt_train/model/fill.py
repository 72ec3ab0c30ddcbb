"""Weights for a model that is laid out already: from disk or drawn, every process its own part, the same on any layout.

A parameter may be a plain tensor or a DTensor of any sharding. Of what is on disk only this process's part is read;
what is drawn is drawn in full by everyone, a layer at a time, and cut.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from llmt_shared.errors import ConfigError
from llmt_shared.progress import say
from llmt_train.model.draw import Take, draw, draw_whole, set_buffers
from llmt_train.model.skeleton import load_skeleton
from llmt_train.model.weights import Box, Stored, open_weights
from llmt_train.parallel.reduction import whole

Where = Callable[[str], tuple[str, slice | None] | None]
"""From a parameter's name to that of the tensor on disk, and which of its rows it is (``None``: all); ``None`` for what
is not the model's own, as adapters are: it is left alone."""

_COLUMNS = 256
"""Of an embedding, how many are whole at a time."""


def same_name(name: str) -> tuple[str, slice | None]:
    """Return where a parameter is of a model whose layers are as transformers built them."""
    return name, None


@torch.no_grad()
def fill(
    model: Any,
    spec: str | Mapping[str, Any],
    *,
    seed: int = 0,
    where: Where = same_name,
    num_rows: int | None = None,
) -> None:
    """Write every parameter and buffer of a model; all processes call it.

    Args:
        model: on its device, without values: from `load_skeleton`, changed and sharded, then `materialise`.
        spec: what `load_skeleton` was given.
        seed: of drawn weights; torch's own generator is left as it was.
        where: the parameters are on disk, or what they are part of where layers are drawn as one.
        num_rows: that the embeddings have by ``spec``, where the model was given more; those get the others' mean.

    Raises:
        ConfigError: the weights on disk are not those of the model, or cannot be read; transformers has no rule by
            which a part of the model could begin.
    """
    build = partial(load_skeleton, spec, dtype=model.get_input_embeddings().weight.dtype)
    skeleton = build()
    targets = _targets(model, skeleton, where, num_rows)
    take = partial(_take, targets, skeleton.all_tied_weights_keys)
    if isinstance(spec, str):
        stored = open_weights(spec, skeleton)
        set_buffers(skeleton, take)
        _read(targets, stored, skeleton, f"model: {spec}: ")
    else:
        _draw(skeleton, build, seed, take)
    left = [name for name, parts in targets.items() if not all(part.is_written for part in parts)]
    if left:
        raise ConfigError(f"model: {model.config.model_type}: transformers does not say how {left[0]} begins")
    if num_rows is not None:
        fill_new_rows(model, num_rows)


def materialise(model: nn.Module, device: torch.device | str) -> None:
    """Give the tensors of a model on the meta device memory, without values; what is tied stays tied."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    model.to_empty(device=device)
    for first, *others in groups.values():
        for name in others:
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, model.get_parameter(first))


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: Tensor) -> Box:
    """Return where this process's part lies in the whole tensor."""
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for axis in _order(tensor.placements):
            dim = tensor.placements[axis].dim  # type: ignore[attr-defined]
            start, stop = bounds[dim]
            size = -(-(stop - start) // mesh.size(axis))  # as torch.chunk: the last may be smaller, or empty
            first = min(start + size * mesh.get_local_rank(axis), stop)
            bounds[dim] = (first, min(first + size, stop))
    return tuple(slice(*bound) for bound in bounds)


def fill_new_rows(model: Any, num_rows: int) -> None:
    """Give the rows of the embeddings after the first ``num_rows`` their mean (Hewitt 2021); all processes call it.

    The mean is rounded to bf16, so that it is the same bits on every machine: checkpoints of adapters do not hold it.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {id(parameter): parameter for layer in layers for parameter in layer.parameters()}
    with torch.no_grad():
        for parameter in found.values():
            _fill_new_rows(parameter, num_rows)


def _fill_new_rows(parameter: Tensor, num_rows: int) -> None:
    rows, *columns = local_box(parameter)
    means = [block[:num_rows].double().mean(0).bfloat16() for block in _blocks(parameter)]
    new = local_part(parameter)[max(num_rows - rows.start, 0) :]
    if new.numel():
        new[:] = (torch.cat(means) if columns else means[0])[tuple(columns)].to(new)


def _blocks(parameter: Tensor) -> Iterator[Tensor]:
    """A parameter on the CPU, a few whole columns at a time; of a vector, all."""
    local = local_part(parameter)
    if isinstance(parameter, DTensor) and parameter.ndim == 2 and local.shape[1] == parameter.shape[1]:
        yield from (_gather(parameter, columns).cpu() for columns in torch.split(local, _COLUMNS, 1))
        return
    full = whole(parameter).cpu()
    yield from torch.split(full, _COLUMNS, 1) if full.ndim == 2 else (full,)


def _gather(parameter: DTensor, columns: Tensor) -> Tensor:
    """Some columns of a parameter that is sharded by rows."""
    size = torch.Size([parameter.shape[0], columns.shape[1]])
    mesh, placements = parameter.device_mesh, parameter.placements
    stride = (columns.shape[1], 1)
    cut = DTensor.from_local(columns.contiguous(), mesh, placements, run_check=False, shape=size, stride=stride)
    return cut.full_tensor()


@dataclass
class _Part:
    """A tensor of the model, and what of the one on disk it is."""

    tensor: Tensor
    rows: slice | None
    """Which; ``None``: all."""
    known: int | None
    """How many of its own rows are there; ``None``: all."""
    is_written: bool = False


def _targets(model: Any, skeleton: Any, where: Where, num_rows: int | None) -> dict[str, list[_Part]]:
    """What is to be written, by names on disk; of tied ones, the name of the source."""
    layers = () if num_rows is None else (model.get_input_embeddings(), model.get_output_embeddings())
    grown = {id(parameter) for layer in layers for parameter in layer.parameters()}
    targets: dict[str, list[_Part]] = {}
    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        found = where(name)
        if found is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            stored, rows = found
            part = _Part(tensor, rows, num_rows if id(tensor) in grown else None)
            targets.setdefault(skeleton.all_tied_weights_keys.get(stored, stored), []).append(part)
    return targets


def _draw(skeleton: Any, build: Callable[..., Any], seed: int, take: Take) -> None:
    try:
        draw(skeleton, seed, take)
    except ValueError as error:
        say(f"note: {error}; every process draws the whole model in its host's memory")
        draw_whole(partial(build, device="cpu"), seed, take)


def _take(targets: Mapping[str, list[_Part]], tied: Mapping[str, str], name: str, tensor: Tensor) -> None:
    for part in targets.get(tied.get(name, name), ()):
        _write(part, lambda box: tensor[box])


def _read(targets: Mapping[str, list[_Part]], stored: Mapping[str, Stored], skeleton: Any, place: str) -> None:
    """Check everything that the headers tell; then read this process's parts."""
    tied = skeleton.all_tied_weights_keys
    names = {name: [name, *(other for other, source in tied.items() if source == name)] for name in targets}
    sources = {name: [stored[each] for each in names[name] if each in stored] for name in targets}
    _check_shapes(targets, sources, place)
    wanted = skeleton.state_dict().keys()
    missing = [name for name in targets if not sources[name] and name in wanted and not _are_written(targets[name])]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"{place}{', '.join(sorted(missing)[:3])}{more} of {type(skeleton).__name__} are not in its *.safetensors; "
            "wanted the weights of a whole causal language model"
        )
    for name, parts in targets.items():
        for part in parts if sources[name] else ():
            _check_tied(part, sources[name], names[name], place)
            _write(part, sources[name][0].read)


def _are_written(parts: Sequence[_Part]) -> bool:
    return all(part.is_written for part in parts)


def _check_shapes(targets: Mapping[str, list[_Part]], sources: Mapping[str, list[Stored]], place: str) -> None:
    for name in sorted(targets):
        wanted = _shape(targets[name])
        for source in sources[name]:
            if source.shape != wanted:
                raise ConfigError(
                    f"{place}{name} is {list(source.shape)} in *.safetensors, but {list(wanted)} by config.json; "
                    "wanted a config.json and weights that belong together"
                )


def _shape(parts: Sequence[_Part]) -> tuple[int, ...]:
    """Of the tensor on disk that parts are of."""
    rows = [part.rows.stop for part in parts if part.rows is not None] or [parts[0].known]
    shape = tuple(parts[0].tensor.shape)
    return shape if rows == [None] else (max(rows), *shape[1:])


def _check_tied(part: _Part, sources: Sequence[Stored], names: Sequence[str], place: str) -> None:
    """Refuse tensors that config.json calls one, and that differ."""
    local, box = _place(part)
    if len(sources) > 1 and local.numel() and not torch.equal(sources[0].read(box), sources[1].read(box)):
        raise ConfigError(
            f"{place}by config.json {' and '.join(names)} are tied, but they differ in *.safetensors; wanted "
            "`tie_word_embeddings: false` there, or weights that are tied"
        )


def _write(part: _Part, read: Callable[[Box], Tensor]) -> None:
    """Write this process's part of a tensor."""
    local, box = _place(part)
    if local.numel():
        local.copy_(read(box))
    part.is_written = True


def _place(part: _Part) -> tuple[Tensor, Box]:
    """What this process is to write, and where that lies in the tensor on disk."""
    local, box = local_part(part.tensor), local_box(part.tensor)
    assert local.shape == tuple(bounds.stop - bounds.start for bounds in box), "a part has not the size of its place"
    if part.known is not None:
        rows = slice(box[0].start, max(box[0].start, min(box[0].stop, part.known)))
        local, box = local[: rows.stop - rows.start], (rows, *box[1:])
    if part.rows is not None:
        box = (slice(part.rows.start + box[0].start, part.rows.start + box[0].stop), *box[1:])
    return local, box


def _order(placements: Sequence[Placement]) -> list[int]:
    """The axes of the mesh that cut a tensor, in the order in which they did.

    From the outer to the inner; but what `fully_shard` cut, it cut after the inner axes.
    """
    late = [axis for axis, placement in enumerate(placements) if isinstance(placement, _StridedShard)]
    early = [axis for axis, placement in enumerate(placements) if isinstance(placement, Shard) and axis not in late]
    return early + late[::-1]
