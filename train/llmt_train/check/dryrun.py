"""One step without numbers: what it keeps in memory, learned by running it on tensors that have a shape and no content.

Everything runs as it will in training (the model's own code, the chunked head, autograd, the optimizer), under
torch's FakeTensorMode, so that any architecture is counted as it is and nothing is allocated; and so over devices:
sharding, splitting and exchanging are what they are in a run, on a rank whose others are not there (`as_rank`).

Shape legend: N packed tokens, H query heads, K key/value heads, D head size.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llmt_shared.errors import LlmtError
from llmt_train.attention import Backend, Call, Options, Segments
from llmt_train.attention.sdpa import sdpa
from llmt_train.check.livebytes import LiveBytes, Moment
from llmt_train.data.batch import PackedBatch, collate
from llmt_train.model.head import HeadSpec, model_scores
from llmt_train.model.load import forward_hidden
from llmt_train.objectives import share
from llmt_train.parallel.mesh import Mesh
from llmt_train.parallel.sharding import shard, synchronise_gradients
from llmt_train.parallel.tensor import tensor_parallel
from llmt_train.tasks import Task


class Peaks(NamedTuple):
    """Bytes of a micro-batch's forward and backward pass, beside weights and gradients."""

    waiting: int
    """What the micro-batches before it left behind: whole gradients, where they are exchanged once a step."""
    kept: int
    """What the layers' forward pass keeps for the backward pass."""
    exchanged: int
    """At the fullest moment, what ranks exchange: parameters made whole, those outside the layers from the forward to
    the backward pass; buffers through which they come; gradients that leave."""
    head: int
    """At the fullest moment until the gradient of the hidden states is there: logits, above all."""
    again: int
    """What the fullest moment of the layers' own passes needs beyond all of these: what is computed again, above all,
    and whole gradients of a layer."""

    @property
    def total(self) -> int:
        """At the fullest moment."""
        return sum(self)


class StepPeaks(NamedTuple):
    """Bytes of the optimizer's step, beside weights and gradients."""

    state: int
    """What stays from step to step."""
    scratch: int
    """On top of it at the fullest moment."""


def micro_batch(
    model: Any,
    head: HeadSpec | None,
    task: Task,
    batch: PackedBatch,
    *,
    attention: Backend = "auto",
    exchanges_once: bool = False,
) -> Peaks:
    """Run a micro-batch forward and backward under count; real tensors serve as well as fake ones.

    Args:
        model: from `fake_copy` or `laid_out_copy`, or a real one on the CPU. Its gradients are made before the count
            starts, as they are there from a step's second micro-batch on.
        head: how it makes logits; ``None`` is the model's own way.
        task: the objective.
        batch: in the model's mode, or real.
        attention: see `model_scores`.
        exchanges_once: count a step's last micro-batch, where ranks exchange gradients at that one alone: then they
            are not there before.
    """

    def run() -> None:
        scores = model_scores(
            model, head, batch, attention=attention, with_mean=task.with_mean, is_uniform=task.is_uniform
        )
        share(task.objective(scores, batch)["loss"], batch.denominators).backward()  # type: ignore[no-untyped-call]

    warm_up(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad and not exchanges_once else None
    with LiveBytes([*_tensors(model), *(leaf for leaf in batch if isinstance(leaf, Tensor))]) as counter:
        if exchanges_once:
            synchronise_gradients(model, False)
            run()
            synchronise_gradients(model, True)
        before = counter.live
        counter.take_fullest()
        kept, borders = _counted(model, run, counter)
    return _peaks(before, kept, borders)


def _counted(model: Any, run: Callable[[], None], counter: LiveBytes) -> tuple[Moment, list[Moment]]:
    """Run; return what is alive after the layers' forward pass, and the fullest moments.

    These are of that pass, of the time until the layers' backward pass, and of that.
    """
    borders: list[Moment] = []
    kept: list[Moment] = []

    def after_layers(module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        kept.append(counter.now)
        borders.append(counter.take_fullest())
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda gradient: borders.append(counter.take_fullest()))

    handle = model.get_decoder().register_forward_hook(after_layers)
    try:
        run()
    finally:
        handle.remove()
    return kept[0], [*borders, counter.take_fullest()]


def _peaks(before: int, kept: Moment, borders: list[Moment]) -> Peaks:
    own = kept.live - kept.exchanged - before
    fullest = max(borders, key=lambda moment: moment.live)
    in_head = max(borders[1].live - kept.live, 0) if len(borders) > 2 else 0
    rest = fullest.live - before - own - in_head
    exchanged = min(fullest.exchanged, rest)
    return Peaks(before, own, exchanged, in_head, rest - exchanged)


def warm_up(model: nn.Module) -> None:
    """Let FSDP2 make whatever it makes once."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def optimizer_step(model: Any, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> StepPeaks:
    """Run steps of an optimizer under count: the first makes its state; gradients are there before."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(model)
    with LiveBytes(_tensors(model)) as counter:
        optimizer.step()
        state = counter.live
        optimizer.step()  # does what it will always do, for which torch works out shapes on tensors of its own, once
        counter.take_peak()
        optimizer.step()
    return StepPeaks(state, counter.take_peak() - state)


def attention_calls(skeleton: Any, compute: torch.dtype | None = None) -> list[Call] | None:
    """Return what a model asks of its attention, call by call, in training; ``None`` where only running it tells.

    Args:
        skeleton: from `load_skeleton`.
        compute: dtype of the run's arithmetic where it is not that of the parameters.

    Raises:
        ConfigError: the model cannot keep packed documents apart.
    """
    calls: list[Call] = []
    with fake_copy(skeleton, _two_documents(), compute) as (model, batch), torch.no_grad():
        try:
            forward_hidden(model, batch, batch.segments(recorded(calls, gpu_attention)))
        except LlmtError:
            raise
        except Exception:  # whatever fails without numbers may work with them
            return None
    return calls


def _two_documents() -> PackedBatch:
    return collate(
        np.zeros((1, 8), np.int64), np.array([2]), np.array([5, 3]), np.array([0, 0]), None, {"targets": 6.0}
    )


@contextmanager
def fake_copy(
    skeleton: Any, batch: PackedBatch, compute: torch.dtype | None = None
) -> Iterator[tuple[Any, PackedBatch]]:
    """Enter a world without numbers; gives a copy of a model and of a micro-batch that live in it, on a fake CPU.

    Args:
        skeleton: a model, on the meta device or any other.
        batch: real.
        compute: dtype of the copy's parameters where it is not their own.
    """
    model = copy.deepcopy(skeleton)
    with FakeTensorMode() as mode:
        yield _fake(model, compute), _fake_batch(batch, mode)


@contextmanager
def laid_out_copy(
    skeleton: Any, batch: PackedBatch, mesh: Mesh, *, sp: bool, compute: torch.dtype | None = None
) -> Iterator[tuple[Any, PackedBatch]]:
    """As `fake_copy`, of a model that is laid out over devices, on one of its ranks.

    Args:
        skeleton: a model on the meta device.
        batch: real; this rank's tokens.
        mesh: of the rank, see `as_rank`.
        sp: whether ranks of tp share tokens.
        compute: dtype of the run's arithmetic where it is not that of the parameters.

    Raises:
        ConfigError: the model cannot be laid out so.
    """
    model = copy.deepcopy(skeleton)
    # Before the mode begins, for meshes are made of tensors with content.
    tensor_parallel(model, mesh, sp=sp)
    shard(model, mesh, compute=compute)
    with FakeTensorMode() as mode:
        yield _fake(model), _fake_batch(batch, mode)


def _fake(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Give a model parameters and buffers of the mode that is entered; tied ones stay tied."""
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in replaced:
                replaced[id(parameter)] = nn.Parameter(_empty(parameter, dtype), parameter.requires_grad)
            module._parameters[name] = None if parameter is None else replaced[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


@torch.no_grad()
def _empty(parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
    if not isinstance(parameter, DTensor):
        return torch.empty(parameter.shape, dtype=dtype)
    own, mesh, places = (
        torch.empty(parameter._local_tensor.shape, dtype=dtype),
        parameter.device_mesh,
        parameter.placements,
    )
    return DTensor.from_local(own, mesh, places, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _fake_batch(batch: PackedBatch, mode: FakeTensorMode) -> PackedBatch:
    tensors: dict[str, Any] = {
        name: mode.from_tensor(value) for name, value in batch._asdict().items() if isinstance(value, Tensor)
    }
    return batch._replace(**tensors)


def cpu_attention(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, options: Options) -> Tensor:
    """Attention as a run on a CPU has it; pieces are taken for one where its memory does not depend on them."""
    if options.dropout or options.window or options.softcap or options.sinks is not None:
        return sdpa(q_NHD, k_NKD, v_NKD, segments, options)
    n = q_NHD.shape[0]
    whole = Segments((n,), segments.cu_seqlens, segments.ids, n)
    return sdpa(q_NHD, k_NKD, v_NKD, whole, options)


def gpu_attention(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, options: Options) -> Tensor:
    """What the fused kernels of a GPU keep: queries, keys, values, output and the log-sum-exp, without a copy."""
    size = v_NKD.shape[2]
    if size > q_NHD.shape[2]:
        return sdpa(q_NHD, k_NKD, v_NKD, segments, options)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_NHD[..., :size], k_NKD[..., :size], v_NKD))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def recorded(calls: list[Call], attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an attention that notes what each call asks of a backend."""

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options) -> Tensor:
        calls.append(
            Call(
                q.dtype,
                q.shape[2],
                v.shape[2],
                bool(options.softcap),
                options.sinks is not None,
                options.dropout > 0,
                options.deterministic,
            )
        )
        return attention(q, k, v, segments, options)

    return attend


def _tensors(model: Any) -> list[Tensor]:
    parameters = list(model.parameters())
    return [*parameters, *(p.grad for p in parameters if p.grad is not None), *model.buffers()]
