"""Bytes of tensors that are alive, counted operation by operation, with numbers or without.

Counted are storages that operations make and nobody has let go of, and those that FSDP2 empties and fills again. The
inside of an operation is not seen, but for those that are known to need much (`_INSIDE`).
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Moment(NamedTuple):
    """What was alive at one time."""

    live: int
    """Bytes, all together."""
    exchanged: int
    """Of them, what ranks exchange by FSDP2: parameters made whole, buffers they come through, gradients made ready."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, counts the bytes of storages that operations make, until they are let go of."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """Start at 0.

        Args:
            known: tensors that are there already and do not count.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: set[int] = set()
        for storage in map(storage_of, known):
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._known.discard, storage._cdata)  # others may come to lie where it lay
        self._sizes: dict[int, int] = {}
        self._exchanged: set[int] = set()
        self._now = Moment(0, 0)
        self._fullest = self._now

    @property
    def live(self) -> int:
        """Bytes that are alive now."""
        return self._now.live

    @property
    def now(self) -> Moment:
        """What is alive now."""
        return self._now

    def take_peak(self) -> int:
        """Return the largest number of bytes that were alive at once since the last call."""
        return self.take_fullest().live

    def take_fullest(self) -> Moment:
        """Return the moment with the most bytes since the last call."""
        fullest, self._fullest = self._fullest, self._now
        return fullest

    def __enter__(self) -> "LiveBytes":
        self._has_numbers = detect_fake_mode() is None
        self._resize = torch.UntypedStorage.resize_
        # Not an operation, so that nobody else tells. FSDP2 frees and allocates parameters by it.
        torch.UntypedStorage.resize_ = _noticed(self._resize, self)  # type: ignore[method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is asked again for what becomes of the local tensors
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func)
        output = func(*args, **kwargs) if answer is None or not _is_fake(args) else answer(*args)
        if self._has_numbers and _is_fake(output):
            return output  # torch works out the shape of a DTensor
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._count(storage, storage.nbytes())
        if func.namespace == "fsdp":
            self._mark(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        inside = _INSIDE.get(func)
        self._note(0 if inside is None else inside(*args))
        return output

    def _resized(self, storage: Any, size: int) -> None:
        self._exchanged.add(storage._cdata)
        self._count(storage, size)
        self._note(0)

    def _count(self, storage: Any, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._drop, key)
        self._add(key, size - self._sizes[key])
        self._sizes[key] = size

    def _mark(self, tensors: Iterable[Tensor]) -> None:
        for key in {tensor.untyped_storage()._cdata for tensor in tensors} - self._exchanged:
            if key in self._sizes:
                self._exchanged.add(key)
                self._now = self._now._replace(exchanged=self._now.exchanged + self._sizes[key])

    def _drop(self, key: int) -> None:
        self._add(key, -self._sizes.pop(key))
        self._exchanged.discard(key)

    def _add(self, key: int, size: int) -> None:
        live, exchanged = self._now
        self._now = Moment(live + size, exchanged + size if key in self._exchanged else exchanged)

    def _note(self, inside: int) -> None:
        if self._now.live + inside > self._fullest.live:
            self._fullest = self._now._replace(live=self._now.live + inside)


def storage_of(tensor: Tensor) -> Any:
    """Return what holds a tensor's bytes on this rank."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


def _noticed(resize: Callable[..., Any], counter: LiveBytes) -> Callable[..., Any]:
    def resized(self: Any, size: int) -> Any:
        result = resize(self, size)
        counter._resized(self, size)
        return result

    return resized


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
