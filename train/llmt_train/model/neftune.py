"""NEFTune: uniform noise on the embeddings of training data (Jain et al. 2023, arXiv:2310.05914)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmt_shared.order import key
from llmt_train.data.batch import PackedBatch

_BLOCK = 1024
"""Tokens of a row whose noise is drawn at a time."""


@contextmanager
def noisy_embeddings(model: Any, batch: PackedBatch, alpha: float, seed: int) -> Iterator[None]:
    """Add noise to what the model's embedding returns, while this is entered.

    A document of n tokens with embeddings of size d gets ``alpha / sqrt(n d)`` times uniform noise in -1 .. 1: n is
    the document's own length, so that it does not matter what it was packed with. The noise of a row is a function of
    its place in the run's order, so that it does not matter how the step is split, nor which ranks share its tokens.

    Args:
        model: from `load_model`.
        batch: the micro-batch; its ``row_places`` say what is drawn.
        alpha: the paper's, 5 to 15; 0 adds nothing.
        seed: the run's.
    """

    def add(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        del module, arguments
        return output + _noise(batch, output, alpha, seed)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _noise(batch: PackedBatch, embedded_1nH: Tensor, alpha: float, seed: int) -> Tensor:
    """Of this rank's tokens; ranks of tp hold the same and get the same, for it is the layers that share them (sp)."""
    num_tokens, size = embedded_1nH.shape[1:]
    device, dtype = embedded_1nH.device, torch.promote_types(embedded_1nH.dtype, torch.float32)
    first = batch.split.cp.rank * num_tokens
    uniform_nH = _uniform(batch, range(first, first + num_tokens), size, seed, device)
    lengths = torch.diff(batch.cu_seqlens).to(dtype)[batch.segment_ids_flat.long()]
    scale = alpha / (lengths * size).sqrt()
    noise_nH = (2 * uniform_nH.to(dtype) - 1) * scale[:, None]
    return noise_nH[None].to(embedded_1nH.dtype)


def _uniform(batch: PackedBatch, tokens: range, size: int, seed: int, device: torch.device) -> Tensor:
    """Numbers in 0 .. 1 for some of the micro-batch's N tokens: a function of a token's place in its row.

    They are drawn for a block of a row's tokens at a time, of which this rank may need a part.
    """
    row_length, parts, token = sum(batch.lengths) // len(batch.row_places), [], tokens.start
    while token < tokens.stop:
        row, place = divmod(token, row_length)
        block, start = divmod(place, _BLOCK)
        generator = torch.Generator(device).manual_seed(key(seed, batch.row_places[row], block))
        drawn = torch.rand(min(_BLOCK, row_length - block * _BLOCK), size, generator=generator, device=device)
        parts.append(drawn[start : start + tokens.stop - token])
        token += len(parts[-1])
    return torch.cat(parts)
