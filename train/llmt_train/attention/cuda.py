"""The backends that need a CUDA device. Right by reading their sources; `scripts/gpu_suite.sh` tries them on a GPU.

All take q [N, H, D], k and v [N, K, D] and return [N, H, D]. The flash kernels count a window as keys to the left
of the query, transformers counts the query too: hence ``window - 1``.

Shape legend: N packed tokens, H query heads, K key/value heads, D head size.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmt_train.attention.segments import Options, Segments


def flash3(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, options: Options) -> Tensor:
    """FlashAttention 3 (Hopper), Shah et al. 2024, arXiv:2407.08608; package ``flash_attn_interface``."""
    from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q_NHD,
        k_NKD,
        v_NKD,
        *_borders(segments),
        softmax_scale=options.scale,
        causal=True,
        window_size=_left_window(options),
        softcap=options.softcap or 0.0,
        deterministic=options.deterministic,
    )
    first: Tensor = out[0] if isinstance(out, tuple) else out  # early releases returned (out, log-sum-exp)
    return first


def flash2(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, options: Options) -> Tensor:
    """FlashAttention 2, Dao 2023, arXiv:2307.08691; package ``flash_attn``."""
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q_NHD,
        k_NKD,
        v_NKD,
        *_borders(segments),
        dropout_p=options.dropout,
        softmax_scale=options.scale,
        causal=True,
        window_size=_left_window(options),
        softcap=options.softcap or 0.0,
        deterministic=options.deterministic,
    )
    return out


def varlen(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, options: Options) -> Tensor:
    """PyTorch's own variable-length flash attention (torch >= 2.11)."""
    from torch.nn.attention import varlen as module

    varlen_attn: Any = module.varlen_attn

    # 2.11 has no such switch and needs none: it hands grouped heads to the kernel as they are.
    has_switch = "enable_gqa" in inspect.signature(varlen_attn).parameters
    gqa = {"enable_gqa": q_NHD.shape[1] != k_NKD.shape[1]} if has_switch else {}
    out: Tensor = varlen_attn(
        q_NHD, k_NKD, v_NKD, *_borders(segments), scale=options.scale, window_size=_left_window(options), **gqa
    )
    return out


def flex(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, options: Options) -> Tensor:
    """FlexAttention, Dong et al. 2024, arXiv:2412.05496; the one fused backend with attention sinks."""
    from torch.nn.attention.flex_attention import AuxRequest

    out_1HND, aux = _compiled_flex()(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q_NHD, k_NKD, v_NKD)),
        score_mod=_soft_capped(options.softcap) if options.softcap else None,
        block_mask=_block_mask(segments, options.window),
        scale=options.scale,
        enable_gqa=q_NHD.shape[1] != k_NKD.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if options.sinks is not None:
        # exp(lse) / (exp(lse) + exp(sink)): the share of the softmax that the sink leaves to the keys. Flex
        # differentiates the log-sum-exp; the flash kernels do not, so they cannot do this.
        out_1HND = out_1HND * torch.sigmoid(aux.lse - options.sinks[None, :, None]).unsqueeze(-1).to(out_1HND.dtype)
    out: Tensor = out_1HND[0].transpose(0, 1)
    return out


def _borders(segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    return segments.cu_seqlens, segments.cu_seqlens, segments.max_length, segments.max_length


def _left_window(options: Options) -> tuple[int, int]:
    return (options.window - 1 if options.window else -1, 0)


def _soft_capped(cap: float) -> Callable[..., Tensor]:
    def modify(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return modify


def _block_mask(segments: Segments, window: int | None) -> Any:
    if window not in segments.block_masks:
        ids = segments.ids

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            # Nothing in here but the window is a number: a compiler makes code anew for each that it meets.
            inside = (ids[query] == ids[key]) & (query >= key)
            return inside if window is None else inside & (query - key < window)

        n = ids.shape[0]
        segments.block_masks[window] = _compiled_create_mask()(seen, None, None, n, n, device=ids.device)
    return segments.block_masks[window]


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Rows of a full micro-batch, of a short one, of the probe at the start, each with and without gradients and with
    # every window. After 8 torch would go on without code, silently, and hold all scores.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _compiled_create_mask() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)  # not compiled it holds a dense N x N mask while it works
