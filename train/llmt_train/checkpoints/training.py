"""What training needs to go on: a model's tensors, its optimizers' state, and the trainer's counts.

Tensors are called ``model.<parameter>`` and ``optimizer.<parameter>.<state>``, the same on every layout, and tied
weights are one tensor. All else is plain data in one small file, written by the first rank and read by all.
"""

import copy
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmt_shared.errors import FormatError
from llmt_train.checkpoints.folders import TENSORS, TRAINER
from llmt_train.checkpoints.sharded import Index, Stored, Writing, read, read_index
from llmt_train.optim import parts_of
from llmt_train.parallel.together import agreed, own_rank

_MODEL, _OPTIMIZER = "model.", "optimizer."
_OF_THE_MACHINE = frozenset({"params", "fused", "foreach", "capturable"})
"""Settings of a parameter group that are not the checkpoint's to say."""
Plain: TypeAlias = dict[str, Any]


class Snapshot(NamedTuple):
    """What a checkpoint of a training is made of."""

    tensors: dict[str, Tensor]
    """Those of the model and optimizers themselves, not copies; on this rank."""
    plain: Plain
    """The trainer's own data, and under ``optimizers`` what of them is no tensor."""


def take(
    checkpoint: Mapping[str, Any], model: nn.Module, optimizers: Sequence[Optimizer], *, trained_alone: bool
) -> Snapshot:
    """Return what a checkpoint is made of.

    Args:
        checkpoint: as Lightning's trainer dumps it; its own states of model and optimizers are not looked at.
        model: of parameters of any layout.
        optimizers: of the model's parameters.
        trained_alone: leave out what does not train.
    """
    own = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    tensors, plain = collect(model, optimizers, trained_alone=trained_alone)
    return Snapshot(tensors, own | {"optimizers": plain})


class WritingTraining:
    """A snapshot on its way to the disk; see `Writing`."""

    def __init__(self, folder: Path, snapshot: Snapshot) -> None:
        """Settle who writes what, all ranks together; nothing is written yet."""
        self._folder = folder
        self._plain = snapshot.plain
        self._tensors = Writing(folder / TENSORS, snapshot.tensors)

    def hold(self) -> None:
        """Copy all to the host's memory: the training may then go on."""
        self._plain = copy.deepcopy(self._plain)
        self._tensors.hold()

    def finish(self) -> list[Path]:
        """Write, all ranks together; return the files that this rank wrote."""
        files = self._tensors.finish()
        return files + agreed(lambda: _write_plain(self._folder / TRAINER, self._plain) if own_rank() == 0 else [])


def save_training(folder: Path, snapshot: Snapshot) -> list[Path]:
    """Write a snapshot into a folder, all ranks together; return the files that this rank wrote."""
    return WritingTraining(folder, snapshot).finish()


def load_training(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer], *, trained_alone: bool) -> Plain:
    """Fill model and optimizers, on any layout, from a checkpoint; return the trainer's own data.

    What is returned has the keys that Lightning looks for: ``state_dict`` is what the model has now.

    Raises:
        FormatError: the checkpoint is damaged, or of another model or optimizer; raised on all ranks.
    """
    plain = agreed(lambda: read_plain(folder / TRAINER))
    states = plain.pop("optimizers", [])
    agreed(lambda: restore(model, optimizers, folder / TENSORS, states, trained_alone=trained_alone))
    return plain | {"state_dict": _model_tensors(model, trained_alone), "optimizer_states": []}


def collect(
    model: nn.Module, optimizers: Sequence[Optimizer], *, trained_alone: bool = False
) -> tuple[dict[str, Tensor], list[Plain]]:
    """Return the tensors by name, and of every optimizer what is no tensor."""
    tensors = _model_tensors(model, trained_alone)
    plain = []
    names = _names(model)
    for part in _parts(optimizers):
        states = {names[parameter]: part.state[parameter] for parameter in _stepped(part) if parameter in part.state}
        for name, state in states.items():
            tensors |= {f"{_OPTIMIZER}{name}.{key}": value for key, value in _tensors(state).items()}
        plain.append(
            {
                "groups": [_plain_group(group, names) for group in part.param_groups],
                "tensors": {name: sorted(_tensors(state)) for name, state in states.items()},
                "numbers": {name: _numbers(state) for name, state in states.items()},
            }
        )
    return tensors, plain


def restore(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    folder: Path,
    plain: Sequence[Plain],
    *,
    trained_alone: bool = False,
) -> None:
    """Fill model and optimizers in place from tensors on disk and what `collect` gave beside them.

    Raises:
        FormatError: the checkpoint is of another model or optimizer.
    """
    index = read_index(folder)
    wanted = _model_tensors(model, trained_alone)
    _check_names(folder, wanted, index)
    parts, names = list(_parts(optimizers)), _names(model)
    if len(parts) != len(plain):
        raise FormatError(f"{folder}: holds the state of {len(plain)} optimizers; the run has {len(parts)}")
    for part, saved in zip(parts, plain, strict=True):
        wanted |= _prepare(folder, part, saved, names, index)
    read(folder, wanted, index)


def state_of(model: nn.Module, *, trained_alone: bool = False) -> dict[str, Tensor]:
    """Return a model's parameters and persistent buffers by name, tied ones once; or its trained parameters alone."""
    state: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad or not trained_alone}
    if not trained_alone:
        persistent = model.state_dict(keep_vars=True)
        state |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return state


def read_model(folder: Path, model: nn.Module, *, trained_alone: bool = False) -> None:
    """Fill a model in place, on any layout, from a checkpoint.

    Raises:
        FormatError: the checkpoint is damaged, or of another model.
    """
    index = read_index(folder / TENSORS)
    wanted = _model_tensors(model, trained_alone)
    _check_names(folder, wanted, index)
    read(folder / TENSORS, wanted, index)


class StoredModel:
    """A model's tensors in a checkpoint, by the model's own names, to be read a few at a time."""

    def __init__(self, checkpoint: Path) -> None:
        """Read what there is; raises FormatError where that is damaged."""
        self._folder = checkpoint / TENSORS
        self._index = read_index(self._folder)
        named = self._index.tensors.items()
        self.shapes = {name.removeprefix(_MODEL): s.shape for name, s in named if name.startswith(_MODEL)}

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place; raises as `sharded.read`."""
        read(self._folder, {_MODEL + name: tensor for name, tensor in tensors.items()}, self._index)


def read_plain(path: Path) -> Plain:
    """Return the content of trainer.pt; nothing in it can run code.

    Raises:
        FormatError: it is damaged, or holds more than tensors and plain containers.
    """
    try:
        content: Plain = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        reason = "it holds something else than tensors and plain data"
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    else:
        if isinstance(content, dict):
            return content
        reason = "it holds no trainer's data"
    raise FormatError(f"{path}: cannot be read: {reason}; remove this step's folder, and the one before it serves")


def _write_plain(path: Path, plain: Plain) -> list[Path]:
    try:
        with path.open("wb") as file:
            torch.save(plain, file)
    except RuntimeError as error:  # torch hides why a file cannot be written
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return [path]


def _model_tensors(model: nn.Module, trained_alone: bool) -> dict[str, Tensor]:
    return {_MODEL + name: tensor for name, tensor in state_of(model, trained_alone=trained_alone).items()}


def _check_names(folder: Path, wanted: Iterable[str], index: Index) -> None:
    """Refuse a checkpoint of another model: one with other tensors.

    Raises:
        FormatError: naming the first that differs.
    """
    odd = sorted(set(wanted) ^ {name for name in index.tensors if name.startswith(_MODEL)})
    if odd:
        what = "the run has no" if odd[0] in index.tensors else "it does not hold"
        raise FormatError(f"{folder}: of another model: {what} {odd[0].removeprefix(_MODEL)}")


def _parts(optimizers: Iterable[Optimizer]) -> Iterator[Optimizer]:
    for optimizer in optimizers:
        yield from parts_of(optimizer)


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _stepped(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _numbers(state: Mapping[str, Any]) -> Plain:
    return {key: value for key, value in state.items() if not isinstance(value, Tensor)}


def _plain_group(group: Mapping[str, Any], names: Mapping[nn.Parameter, str]) -> Plain:
    own = {key: value for key, value in group.items() if key not in _OF_THE_MACHINE}
    return own | {"params": [names[parameter] for parameter in group["params"]]}


def _prepare(
    folder: Path, optimizer: Optimizer, saved: Plain, names: Mapping[nn.Parameter, str], index: Index
) -> dict[str, Tensor]:
    """Give an optimizer the groups that a checkpoint has and empty states; return these tensors by name."""
    now = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if now != [group["params"] for group in saved["groups"]]:
        raise FormatError(f"{folder}: the optimizer's groups are of other parameters than the run's")
    wanted: dict[str, Tensor] = {}
    for group, saved_group in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update({key: value for key, value in saved_group.items() if key not in _OF_THE_MACHINE})
        counts_on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            name = names[parameter]
            full = {key: f"{_OPTIMIZER}{name}.{key}" for key in saved["tensors"].get(name, ())}
            missing = sorted(set(full.values()) - index.tensors.keys())
            if missing:
                raise FormatError(f"{folder}: holds no {missing[0]}")
            state = {key: _empty(parameter, index.tensors[full[key]], counts_on_device) for key in full}
            wanted |= {full[key]: tensor for key, tensor in state.items()}
            if name in saved["tensors"]:
                optimizer.state[parameter] = state | saved["numbers"][name]
    return wanted


def _empty(parameter: nn.Parameter, stored: Stored, counts_on_device: bool) -> Tensor:
    """A tensor for a state of a parameter: laid out as the parameter is, where it has its shape; else whole."""
    dtype = stored.torch_dtype
    if not stored.shape:  # a count of steps
        return torch.empty((), dtype=dtype, device=parameter.device if counts_on_device else "cpu")
    if dtype.is_floating_point:
        dtype = parameter.dtype
    if stored.shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(stored.shape, dtype=dtype, device=parameter.device)
