"""One step without numbers: what it keeps in memory, learned by running it on tensors that have a shape and no content.

Everything runs as it will in training (the model's own code, the chunked head, autograd, the optimizer), under
torch's FakeTensorMode, so that any architecture is counted as it is and nothing is allocated. What is counted is
storages that operations make and nobody has let go of; the inside of an operation is not seen, but for those that are
known to need much (`_INSIDE`).

Shape legend: N packed tokens, H query heads, K key/value heads, D head size.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmt_shared.errors import LlmtError
from llmt_train.attention import Backend, Call, Options, Segments
from llmt_train.attention.sdpa import sdpa
from llmt_train.data.batch import PackedBatch, collate
from llmt_train.model.head import HeadSpec, model_scores
from llmt_train.model.load import forward_hidden
from llmt_train.objectives import share
from llmt_train.tasks import Task


class Peaks(NamedTuple):
    """Bytes of a micro-batch's forward and backward pass, beside weights and gradients."""

    kept: int
    """What the layers' forward pass keeps for the backward pass, casts of weights included."""
    head: int
    """On top of it at the fullest moment until the gradient of the hidden states is there: logits, above all."""
    again: int
    """What the fullest moment of the layers' own passes needs beyond both: what is computed again, above all."""

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


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, counts the bytes of storages that operations make, until they are let go of."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """Start at 0.

        Args:
            known: tensors that are there already and do not count.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self._peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _ANSWERS.get(func)
        output = func(*args, **(kwargs or {})) if answer is None or not _is_fake(args) else answer(*args)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        inside = _INSIDE.get(func)
        self._peak = max(self._peak, self.live + (inside(*args) if inside is not None else 0))
        return output

    def take_peak(self) -> int:
        """Return the largest number of bytes that were alive at once since the last call."""
        peak, self._peak = self._peak, self.live
        return peak

    def _add(self, storage: Any) -> None:
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def micro_batch(
    model: Any,
    head: HeadSpec | None,
    task: Task,
    batch: PackedBatch,
    *,
    attention: Backend = "auto",
    autocast: torch.dtype | None = None,
) -> Peaks:
    """Run a micro-batch forward and backward under count; real tensors serve as well as fake ones.

    Args:
        model: from `fake_copy`, or a real one on the CPU. Its gradients are made before the count starts, as they are
            there from a step's second micro-batch on.
        head: how it makes logits; ``None`` is the model's own way.
        task: the objective.
        batch: in `fake_copy`'s mode, or real.
        attention: see `model_scores`.
        autocast: compute dtype of the run where it is not that of the parameters.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    counter = LiveBytes([*_tensors(model), *(leaf for leaf in batch if isinstance(leaf, Tensor))])
    borders: list[int] = []  # fullest moments of the layers' forward pass and of what is between it and its backward
    kept: list[int] = []

    def after_layers(module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        kept.append(counter.live)
        borders.append(counter.take_peak())
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda gradient: borders.append(counter.take_peak()))

    handle = model.get_decoder().register_forward_hook(after_layers)
    try:
        with counter:
            with _autocast(batch.input_ids.device.type, autocast):
                scores = model_scores(
                    model, head, batch, attention=attention, with_mean=task.with_mean, is_uniform=task.is_uniform
                )
            share(task.objective(scores, batch)["loss"], batch.denominators).backward()  # type: ignore[no-untyped-call]
            borders.append(counter.take_peak())
    finally:
        handle.remove()
    forward, *middle, backward = borders
    in_head = max(middle[0] - kept[0], 0) if middle else 0
    return Peaks(kept[0], in_head, max(forward, *middle, backward) - kept[0] - in_head)


def optimizer_step(model: Any, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> StepPeaks:
    """Run two steps of an optimizer under count: the first makes its state; gradients are there before."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(model)
    counter = LiveBytes(_tensors(model))
    with counter:
        optimizer.step()
        state = counter.live
        counter.take_peak()
        optimizer.step()
    return StepPeaks(state, counter.take_peak() - state)


def attention_calls(skeleton: Any, autocast: torch.dtype | None = None) -> list[Call] | None:
    """Return what a model asks of its attention, call by call, in training; ``None`` where only running it tells.

    Args:
        skeleton: from `load_skeleton`.
        autocast: compute dtype of the run where it is not that of the parameters.

    Raises:
        ConfigError: the model cannot keep packed documents apart.
    """
    calls: list[Call] = []
    with fake_copy(skeleton, _two_documents()) as (model, batch), torch.no_grad(), _autocast("cpu", autocast):
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


def _autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast(device, dtype) if dtype is not None else nullcontext()


@contextmanager
def fake_copy(skeleton: Any, batch: PackedBatch) -> Iterator[tuple[Any, PackedBatch]]:
    """Enter a world without numbers; gives a copy of a model and of a micro-batch that live in it, on a fake CPU.

    Args:
        skeleton: a model, on the meta device or any other.
        batch: real.
    """
    model = copy.deepcopy(skeleton)
    with FakeTensorMode() as mode:
        replaced: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in replaced:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    replaced[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
                module._parameters[name] = None if parameter is None else replaced[id(parameter)]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
        tensors: dict[str, Any] = {
            name: mode.from_tensor(value) for name, value in batch._asdict().items() if isinstance(value, Tensor)
        }
        yield model, batch._replace(**tensors)


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


def _is_fake(args: Any) -> bool:
    return any(isinstance(leaf, Tensor) and hasattr(leaf, "fake_mode") for leaf in tree_leaves(args))


def _grouped_product(a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: Any) -> Tensor:
    """Experts' products in dtypes for which torch knows the kernel but not its shape."""
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    assert offsets is not None  # two matrices are cut into groups
    return a.new_empty(offsets.shape[0], a.shape[0], b.shape[1])


_aten = torch.ops.aten
_ANSWERS: dict[Any, Callable[..., Any]] = {
    _aten._grouped_mm.default: _grouped_product,
    _aten._local_scalar_dense.default: lambda tensor: 1.0,  # an optimizer's count of steps, a norm
    _aten.allclose.default: lambda *arguments: True,
}
"""What fake tensors cannot answer because the numbers are not there, or their shapes not known."""


_INSIDE: dict[Any, Callable[..., int]] = {
    _aten.logsumexp.default: lambda tensor, *_: tensor.numel() * tensor.element_size()  # exp(x - max) as a whole
}
"""Bytes that an operation holds while it works: of those whose inside matters here."""
