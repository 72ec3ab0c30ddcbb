"""NEFTune: uniform noise on the embeddings of training data (Jain et al. 2023, arXiv:2310.05914)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmt_shared.order import key
from llmt_train.data.batch import PackedBatch


@contextmanager
def noisy_embeddings(model: Any, batch: PackedBatch, alpha: float, seed: int) -> Iterator[None]:
    """Add noise to what the model's embedding returns, while this is entered.

    A document of n tokens with embeddings of size d gets ``alpha / sqrt(n d)`` times uniform noise in -1 .. 1: n is
    the document's own length, so that it does not matter what it was packed with. The noise of a row is a function of
    its place in the run's order, so that it does not matter how the step is split.

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


def _noise(batch: PackedBatch, embedded_1NH: Tensor, alpha: float, seed: int) -> Tensor:
    num_rows, (_, num_tokens, size) = len(batch.row_places), embedded_1NH.shape
    device, dtype = embedded_1NH.device, torch.promote_types(embedded_1NH.dtype, torch.float32)
    rows = []
    for place in batch.row_places:
        generator = torch.Generator(device).manual_seed(key(seed, place))
        rows.append(torch.rand(num_tokens // num_rows, size, generator=generator, device=device))
    lengths = torch.diff(batch.cu_seqlens).to(dtype)[batch.segment_ids_flat.long()]
    scale = alpha / (lengths * size).sqrt()
    noise_NH = (2 * torch.cat(rows).to(dtype) - 1) * scale[:, None]
    return noise_NH[None].to(embedded_1NH.dtype)
