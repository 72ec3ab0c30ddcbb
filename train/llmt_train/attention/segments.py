"""Where the pieces of a packed row begin and end, as attention wants to know it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmt_train.parallel.mesh import ALONE, Axis

Backend = str | Callable[..., Tensor]
"""``auto``, one of ``BACKENDS``, or a function in their place, for whoever asks about shapes and sizes alone."""


@dataclass(frozen=True, eq=False)
class Segments:
    """P pieces that tile N tokens: padding is a piece too, so that no kernel leaves an output row undefined."""

    lengths: tuple[int, ...]
    """P lengths on the host, each > 0: no backend has to wait for the device to learn them."""
    cu_seqlens: Tensor
    """[P + 1] int32 on the device; from 0 to N."""
    ids: Tensor
    """[N] int32 on the device; the piece of each token, from 0."""
    max_length: int
    backend: Backend = "auto"
    """The run's choice. It travels with the data, so there is no global switch."""
    deterministic: bool = False
    """Whether only backends whose backward gives the same bits every time may serve."""
    cp: Axis = ALONE
    """Ranks each of which brings N / size consecutive tokens to an attention over all N (context parallel)."""
    block_masks: dict[int | None, Any] = field(default_factory=dict, repr=False)
    """FlexAttention's masks by window: made by the first layer that needs one, shared by the others."""

    @staticmethod
    def from_lengths(
        lengths: Sequence[int], device: torch.device | str = "cpu", backend: Backend = "auto"
    ) -> "Segments":
        """Return the segments of pieces laid end to end."""
        sizes = torch.tensor(lengths, dtype=torch.int32)
        cu_seqlens = torch.cat([sizes.new_zeros(1), sizes.cumsum(0, dtype=torch.int32)])
        ids = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), sizes)
        return Segments(tuple(lengths), cu_seqlens.to(device), ids.to(device), max(lengths), backend)


class Options(NamedTuple):
    """What a model asks of its attention, beside being causal."""

    scale: float
    """Factor of the scores, before the soft cap."""
    window: int | None = None
    """Keys that a query sees, itself included (the convention of transformers); ``None`` is all."""
    softcap: float | None = None
    """c of ``c * tanh(scores / c)``; ``None`` is no cap."""
    sinks: Tensor | None = None
    """[H]; a score that joins each head's softmax and carries no value."""
    dropout: float = 0.0
    """Probability of dropping a weight; 0 in evaluation."""
    deterministic: bool = False
