"""Attention by splitting: every segment is a call of PyTorch's own attention. Exact on any device and in any dtype.

Nothing here grows with the square of the row: full attention costs what its segments cost, a window costs its band.

Shape legend: N packed tokens, H query heads, K key/value heads, D head size, n tokens of one segment, W window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmt_train.attention.segments import Options, Segments

_BLOCK = 256  # queries whose scores are held at a time where SDPA cannot help


def sdpa(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, options: Options) -> Tensor:
    """Return [N, H, D]."""
    lengths = list(segments.lengths)
    # One split per tensor: its backward is one concatenation, where x[a:b] would zero-fill a whole row per segment.
    split = [torch.split(x.transpose(0, 1)[None], lengths, dim=2) for x in (q_NHD, k_NKD, v_NKD)]
    return torch.cat([_one_segment(q, k, v, options) for q, k, v in zip(*split, strict=True)], dim=2)[0].transpose(0, 1)


def _one_segment(q_1HnD: Tensor, k_1KnD: Tensor, v_1KnD: Tensor, options: Options) -> Tensor:
    if options.softcap or options.sinks is not None:
        return _blockwise(q_1HnD, k_1KnD, v_1KnD, options)
    if options.window and options.window < q_1HnD.shape[2]:
        return _banded(q_1HnD, k_1KnD, v_1KnD, options.window, options)
    return _sdpa(q_1HnD, k_1KnD, v_1KnD, options, is_causal=True)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, options: Options, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, mask, options.dropout, is_causal=is_causal, scale=options.scale, enable_gqa=gqa
    )


def _banded(q_1HnD: Tensor, k_1KnD: Tensor, v_1KnD: Tensor, W: int, options: Options) -> Tensor:
    """Attend in blocks of W queries, each to its own block of keys and the one before: the band lies inside."""
    n = q_1HnD.shape[2]
    q, k, v = (_blocks(x, W) for x in (q_1HnD, k_1KnD, v_1KnD))  # [b, heads, W, D]
    first = _sdpa(q[:1], k[:1], v[:1], options, is_causal=True)
    k_rest, v_rest = (torch.cat([x[:-1], x[1:]], dim=2) for x in (k, v))  # [b - 1, K, 2 W, D]
    query, key = torch.arange(W, device=q.device)[:, None], torch.arange(2 * W, device=q.device)
    band = (key > query) & (key <= query + W)  # the query stands at place W + query of its 2 W keys
    rest = _sdpa(q[1:], k_rest, v_rest, options, mask=band)
    return torch.cat([first, rest]).transpose(0, 1).flatten(1, 2)[None, :, :n]


def _blocks(x_1HnD: Tensor, size: int) -> Tensor:
    """[b, H, size, D]; zeros fill the last block: keys that only queries which are cut off again can see."""
    padded = F.pad(x_1HnD[0], (0, 0, 0, -x_1HnD.shape[2] % size))
    return padded.view(padded.shape[0], -1, size, padded.shape[2]).transpose(0, 1)


def _blockwise(q_1HnD: Tensor, k_1KnD: Tensor, v_1KnD: Tensor, options: Options) -> Tensor:
    """Plain maths for what SDPA has no switch for, a block of queries at a time, recomputed in the backward pass."""
    groups = q_1HnD.shape[1] // k_1KnD.shape[1]
    q, k, v = q_1HnD[0], k_1KnD[0].repeat_interleave(groups, 0), v_1KnD[0].repeat_interleave(groups, 0)
    outputs = []
    for first in range(0, q.shape[1], _BLOCK):
        last = min(first + _BLOCK, q.shape[1])
        first_key = max(0, first - options.window + 1) if options.window else 0
        arguments = (q[:, first:last], k[:, first_key:last], v[:, first_key:last], first - first_key, options)
        outputs.append(
            checkpoint(_plain, *arguments, use_reentrant=False, preserve_rng_state=options.dropout > 0)
            if torch.is_grad_enabled()
            else _plain(*arguments)
        )
    return torch.cat(outputs, dim=1)[None]


def _plain(q_HqD: Tensor, k_HkD: Tensor, v_HkD: Tensor, offset: int, options: Options) -> Tensor:
    """Softmax attention by its definition; query i stands at place ``offset + i`` of the keys. At least fp32."""
    dtype = torch.promote_types(q_HqD.dtype, torch.float32)
    scores = (q_HqD @ k_HkD.transpose(1, 2)).to(dtype) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    distance = (torch.arange(q_HqD.shape[1]) + offset)[:, None] - torch.arange(k_HkD.shape[1])
    seen = (distance >= 0) & (distance < (options.window or distance.shape[1]))
    scores = scores.masked_fill(~seen.to(scores.device), float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.to(dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sinks], dim=2)
    weights = scores.softmax(dim=2)[..., : k_HkD.shape[1]]
    return F.dropout(weights, options.dropout).to(v_HkD.dtype) @ v_HkD
