"""Context parallel: ranks that share the tokens of a micro-batch, and how they attend to all of them.

Between attentions a rank carries consecutive tokens, all heads of each; inside attention it has all tokens of some
heads, so that any backend serves and a segment may lie anywhere (Ulysses: Jacobs et al. 2023, arXiv:2309.14509).

Shape legend: N tokens of a micro-batch, n of them on this rank, H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from llmt_shared.errors import ConfigError
from llmt_train.parallel.collectives import swap
from llmt_train.parallel.mesh import ALONE, Axis

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Of queries, keys, values and sinks [H]."""


class TokenSplit(NamedTuple):
    """Which ranks share the tokens of a micro-batch."""

    tp: Axis = ALONE
    """Ranks that share every layer; what is drawn in a forward pass they must draw alike."""
    cp: Axis = ALONE
    """Ranks each of which carries its part of the tokens through the model."""
    sp: bool = False
    """Whether each rank of tp holds, between layers, but a part of the tokens that its cp carries."""

    @property
    def multiple(self) -> int:
        """Ranks that the tokens must divide by."""
        return self.cp.size * (self.tp.size if self.sp else 1)


WHOLE = TokenSplit()
"""Every rank has all tokens of its micro-batch."""


def attend_by_heads(
    attention: Attention, q_nHD: Tensor, k_nKD: Tensor, v_nKD: Tensor, sinks_H: Tensor | None, cp: Axis
) -> Tensor:
    """Attend to the tokens of all ranks: [n, H, value size] of this rank's.

    Args:
        attention: of N tokens and the heads that it is given.
        q_nHD: queries.
        k_nKD: keys; where K does not divide by the ranks, heads are repeated, as few times as will do.
        v_nKD: values.
        sinks_H: something of each head.
        cp: the ranks.

    Raises:
        ConfigError: the heads do not divide by the ranks.
    """
    if cp.size == 1:
        return attention(q_nHD, k_nKD, v_nKD, sinks_H)
    times = repeats(q_nHD.shape[1], k_nKD.shape[1], cp.size)
    k_nKD, v_nKD = (x if times == 1 else x.repeat_interleave(times, 1) for x in (k_nKD, v_nKD))
    sinks = None if sinks_H is None else sinks_H.chunk(cp.size)[cp.rank]
    q, k, v = (swap(x, cp, split_dim=1, concat_dim=0) for x in (q_nHD, k_nKD, v_nKD))
    return swap(attention(q, k, v, sinks), cp, split_dim=0, concat_dim=1)


def repeats(heads: int, kv_heads: int, size: int) -> int:
    """Return how often each key/value head must be there for ``size`` ranks to have equal numbers of them.

    Raises:
        ConfigError: the query heads do not divide by the ranks.

    >>> repeats(8, 2, 4)
    2
    """
    if heads % size:
        raise ConfigError(f"parallel.cp: {size} does not divide the {heads} attention heads of a device")
    group = heads // kv_heads
    return next(times for times in range(1, group + 1) if group % times == 0 and kv_heads * times % size == 0)
