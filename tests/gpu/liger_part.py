"""Log-probabilities and gradients of whole models with Liger's kernels and without, against fp64."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu.device_part import device_of
from gpu.exact import compare
from gpu.models import TINY_LLAMA, TINY_PHI
from gpu.record import Report
from torch import Tensor

from llmt_shared.errors import ConfigError
from llmt_train.data.batch import PackedBatch, collate
from llmt_train.model.head import find_head, model_scores
from llmt_train.model.liger import Kernels, check_liger, liger_kernels, use_liger
from llmt_train.model.load import load_model

_GEMMA = TINY_LLAMA | {"model_type": "gemma2", "query_pre_attn_scalar": 16}
MODELS = {
    "llama": TINY_LLAMA,
    "phi3": TINY_PHI,
    # GELU, and norms whose weight counts from 1.
    "gemma2": {key: value for key, value in _GEMMA.items() if key != "rope_parameters"},
}
_LENGTHS = [1, 90, 37, 2, 60, 66]


def run(report: Report, profile: str) -> None:
    """Compare; without Liger only plain maths in its place, which shows that the comparison runs."""
    device = device_of(profile)
    try:
        check_liger(device)
        kernels = liger_kernels()
    except ConfigError as missing:
        report.absent("liger's kernels", str(missing))
        if profile != "dry":
            return
        kernels = PLAIN
    for name, config in MODELS.items():
        for dtype in (torch.float32, torch.bfloat16):
            with report.case(f"{name} {str(dtype)[6:]}") as values:
                _compare(config, dtype, kernels, device, values)


def _compare(config: dict[str, Any], dtype: torch.dtype, kernels: Kernels, device: str, values: dict[str, Any]) -> None:
    plain = load_model({"from_config": config}).to(device)
    _spread_weights(plain)
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    values["modules"] = use_liger(fused, kernels)
    batch = _batch(config["vocab_size"]).to(device)
    found, usual = (_scores_and_gradients(model, batch, dtype) for model in (fused, plain))
    compare(found, usual, _scores_and_gradients(exact, batch, torch.float64), values)


def _spread_weights(model: Any) -> None:
    """Give norms weights that differ from each other, as training does: a kernel that left them out would show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) / 4)


def _scores_and_gradients(model: Any, batch: PackedBatch, dtype: torch.dtype) -> Sequence[Tensor]:
    """Log-probability of every label, and all gradients of their sum; in bf16 with weights in fp32, as models train."""
    context = torch.autocast(batch.labels.device.type, dtype) if dtype == torch.bfloat16 else nullcontext()
    head = find_head(model)
    with context:
        # A backend that serves every format, so that none of it is Liger's doing.
        logps = model_scores(model, head, batch, attention="sdpa").logps
    logps.sum().backward()
    return [logps.detach(), *(parameter.grad for parameter in model.parameters())]


def _batch(vocab_size: int) -> PackedBatch:
    tokens = np.random.default_rng(0).integers(3, vocab_size, (1, sum(_LENGTHS)))
    lengths = np.array(_LENGTHS)
    return collate(tokens, np.array([len(lengths)]), lengths, np.zeros(len(lengths), np.int64), None, {"targets": 1.0})


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
    del casting
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)).to(x.dtype)


PLAIN = Kernels(_rms_norm, lambda a, b: F.silu(a) * b, lambda a, b: F.gelu(a, approximate="tanh") * b)
