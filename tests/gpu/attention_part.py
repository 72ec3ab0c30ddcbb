"""Every attention backend: against its definition in fp64, isolation, determinism, time and memory.

Shape legend: N packed tokens, H query heads, K key/value heads, D head size.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu.device_part import device_of
from gpu.exact import compare
from gpu.record import AbsentError, Report, require
from gpu.timing import median_ms, peak_mb
from torch import Tensor
from torch._dynamo.utils import counters

from llmt_train.attention import BACKENDS, Call, Segments, machine_of, refusal, varlen_attention
from llmt_train.config import SyntheticConfig
from llmt_train.data.synthetic import open_synthetic


class Case(NamedTuple):
    """What a model asks of its attention."""

    name: str
    kv_heads: int
    head_dim: int
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    lengths: str = "mixed"
    heads: int = 8

    def call(self, dtype: torch.dtype, deterministic: bool = False) -> Call:
        """What decides whether a backend can serve."""
        return Call(dtype, self.head_dim, self.head_dim, bool(self.softcap), self.has_sinks, False, deterministic)


CASES = (
    Case("mha 96", 8, 96),  # Phi-3
    Case("gqa 64", 2, 64),  # Llama 3.2 1B
    Case("gqa 128", 2, 128),  # Llama 3 8B
    Case("mqa 256", 1, 256),  # Gemma
    Case("window", 2, 64, window=100),
    Case("softcap", 2, 64, softcap=30.0),
    Case("softcap, window", 4, 256, window=100, softcap=50.0),  # Gemma 2
    Case("sinks", 2, 64, has_sinks=True),
    Case("one segment", 2, 64, lengths="one"),
    Case("many segments", 2, 64, lengths="many"),
)

LENGTHS = {
    "mixed": [1, 300, 7, 1, 513, 2, 128, 72],  # the last one stands for a padding tail
    "one": [1024],
    "many": [1, 2, 3, 5, 9, 12] * 32,
}
"""Each of 1024 tokens: a document of one token is as short as there is."""

_COMPILED = ("flex",)
"""Backends that make code for every shape."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Sizes(NamedTuple):
    """How much is tried."""

    divisor: int
    """Of the lengths of segments."""
    slow: Sequence[str]
    """Cases that are tried also where a backend compiles for each of them."""
    tokens: int
    """Of the rows that are timed."""
    repeats: int


_FEW = ("gqa 64", "softcap, window", "sinks")
SIZES = {
    "dry": Sizes(16, ("gqa 64",), 128, 1),
    "quick": Sizes(1, _FEW, 16384, 10),
    "full": Sizes(1, tuple(case.name for case in CASES), 16384, 20),
}


def run(report: Report, profile: str) -> None:
    """Try every backend that is here."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need, from the start
    device, sizes = device_of(profile), SIZES[profile]
    # What compiles comes last: it takes most of the time.
    for backend in sorted(_present(report, device), key=lambda name: name in _COMPILED):
        _try_backend(report, backend, device, sizes)


def _try_backend(report: Report, backend: str, device: str, sizes: Sizes) -> None:
    for name in _DTYPES:
        for case in CASES:
            _check_case(report, backend, case, name, device, sizes)
    with report.case(f"{backend} isolation"):
        _check_isolation(backend, device, sizes)
    with report.case(f"{backend} deterministic"):
        _check_deterministic(backend, device, sizes)
    for head_dim in (64, 128):
        for median in (512, None):
            with report.case(f"{backend} {head_dim} {'one document' if median is None else 'documents'}") as values:
                values.update(_speed(backend, Case("", 8, head_dim, heads=32), median, device, sizes))
    if backend in _COMPILED:
        with report.case(f"{backend} other segments, same code"):
            _check_same_code(backend, device, sizes)


def definition(q: Tensor, k: Tensor, v: Tensor, segments: Segments, case: Case, sinks: Tensor | None) -> Tensor:
    """Dense attention with every pair of tokens written out; softmax in at least fp32, as models without a kernel do.

    Args:
        q: [N, H, D].
        k: [N, K, D].
        v: [N, K, D].
        segments: of the N tokens.
        case: window and soft cap.
        sinks: [H].
    """
    groups, dtype = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k).to(dtype) * case.head_dim**-0.5
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    place = torch.arange(q.shape[0], device=q.device)
    distance = place[:, None] - place[None]
    seen = (segments.ids[:, None] == segments.ids[None]) & (distance >= 0)
    if case.window:
        seen &= distance < case.window
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    weights = scores.softmax(-1)[..., : q.shape[0]].to(v.dtype)
    return torch.einsum("hij,jhd->ihd", weights, v)


def _present(report: Report, device: str) -> Iterator[str]:
    for backend in BACKENDS:
        reason = refusal(backend, Call(torch.bfloat16, 64, 64), machine_of(torch.device(device)))
        if reason is None:
            yield backend
        else:
            report.absent(backend, reason)


def _check_case(report: Report, backend: str, case: Case, dtype: str, device: str, sizes: Sizes) -> None:
    is_plain = case.name == "gqa 64"
    if not is_plain and (dtype != "bf16" or (backend in _COMPILED and case.name not in sizes.slow)):
        return  # what another format changes shows in any case
    reason = refusal(backend, case.call(_DTYPES[dtype]), machine_of(torch.device(device)))
    if reason is not None:
        report.absent(f"{backend} {dtype} {case.name}", reason)
        return
    with report.case(f"{backend} {dtype} {case.name}") as values:
        case = case._replace(window=case.window and case.window // sizes.divisor)
        segments = _segments(case.lengths, device, sizes)
        inputs, upstream = _inputs(case, segments, _DTYPES[dtype], device)
        found = _with_gradients(lambda *x: _attend(x, segments, case, backend), inputs, upstream)
        plain, truth = (
            _with_gradients(
                lambda q, k, v, *sinks: definition(q, k, v, segments, case, sinks[0] if sinks else None),
                [x.detach().to(torch.promote_types(x.dtype, to)).requires_grad_() for x in inputs],
                upstream.to(to),
            )
            for to in (_DTYPES[dtype], torch.float64)
        )
        compare(found, plain, truth, values)


def _attend(inputs: Sequence[Tensor], segments: Segments, case: Case, backend: str, exact: bool = False) -> Tensor:
    q, k, v, *sinks = inputs
    return varlen_attention(
        q, k, v, segments, window=case.window, softcap=case.softcap, sinks=sinks[0] if sinks else None,
        backend=backend, deterministic=exact,
    )  # fmt: skip


def _with_gradients(function: Any, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, list(inputs), upstream)]


def _segments(name: str, device: str, sizes: Sizes) -> Segments:
    lengths = LENGTHS[name]
    if sizes.divisor > 1:
        lengths = [max(1, length // sizes.divisor) for length in lengths[:12]]
    return Segments.from_lengths(lengths, device)


def _inputs(
    case: Case, segments: Segments, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Queries, keys, values, perhaps sinks (in fp32); and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(segments.lengths), heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    drawn = [torch.randn(shape, generator=generator) for shape in [*shapes, shapes[0]]]
    inputs, upstream = [x.to(device, dtype).requires_grad_() for x in drawn[:3]], drawn[3].to(device, dtype)
    if case.has_sinks:
        # A parameter: under autocast it stays in fp32.
        inputs.append(torch.linspace(-1, 2, case.heads, device=device).requires_grad_())
    return inputs, upstream


def _check_isolation(backend: str, device: str, sizes: Sizes) -> None:
    """A segment's output is the same to the last bit whatever the others hold, and no gradient leaves it."""
    case, segments = CASES[1], _segments("mixed", device, sizes)
    inputs, _ = _inputs(case, segments, torch.bfloat16, device)
    others, _ = _inputs(case, segments, torch.bfloat16, device, seed=1)
    for watched in range(len(segments.lengths)):
        inside = segments.ids == watched
        mixed = [torch.where(inside[:, None, None], own, other) for own, other in zip(inputs, others, strict=True)]
        outputs = [_attend(x, segments, case, backend)[inside] for x in (inputs, mixed)]
        require(torch.equal(*outputs), f"segment {watched} of {segments.lengths} sees others")
        for gradient in torch.autograd.grad(outputs[0].sum(), inputs):
            require(not gradient[~inside].any(), f"a gradient of segment {watched} of {segments.lengths} leaves it")


def _check_deterministic(backend: str, device: str, sizes: Sizes) -> None:
    """Three backward passes give the same bits where that was asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        case = Case("", 2, 64)
        reason = refusal(backend, case.call(torch.bfloat16, deterministic=True), machine_of(torch.device(device)))
        if reason is not None:
            raise AbsentError(reason)
        segments = Segments.from_lengths(_document_lengths(sizes.tokens, 512), device)
        inputs, upstream = _inputs(case, segments, torch.bfloat16, device)
        first, *others = (
            _with_gradients(lambda *x: _attend(x, segments, case, backend, exact=True), inputs, upstream)
            for _ in range(3)
        )
        same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        require(same, "passes over the same input differ")
    finally:
        torch.use_deterministic_algorithms(before)


def _speed(backend: str, case: Case, median: float | None, device: str, sizes: Sizes) -> dict[str, Any]:
    """Time and memory of forward and backward; arithmetic counts the keys that are really seen."""
    lengths = [sizes.tokens] if median is None else _document_lengths(sizes.tokens, median)
    segments = Segments.from_lengths(lengths, device)
    inputs, upstream = _inputs(case, segments, torch.bfloat16, device)

    def forward() -> Tensor:
        with torch.no_grad():
            return _attend(inputs, segments, case, backend)

    def both() -> Any:
        return _with_gradients(lambda *x: _attend(x, segments, case, backend), inputs, upstream)

    milliseconds = median_ms(both, device, sizes.repeats)
    keys = sum(length * (length + 1) / 2 for length in lengths)
    return {
        "forward ms": median_ms(forward, device, sizes.repeats),
        "both ms": milliseconds,
        "TFLOP/s": 12 * case.heads * case.head_dim * keys / milliseconds / 1e9,
        "peak MB": peak_mb(both, device),
    }


def _document_lengths(tokens: int, median: float, seed: int = 0) -> list[int]:
    """Lengths of documents that fill a row, like those of web text."""
    settings = SyntheticConfig(length=tokens, median=min(median, tokens / 4), seed=seed, rows=8)
    row = open_synthetic(settings, "pretrain", 100).train.row_segments(np.arange(1))
    lengths: list[int] = row.length.tolist()
    return [*lengths, tokens - sum(lengths)] if sum(lengths) < tokens else lengths


def _check_same_code(backend: str, device: str, sizes: Sizes) -> None:
    """Rows of one size compile once, wherever their documents begin."""
    case = CASES[1]
    compiled = []
    for seed in range(4):
        segments = Segments.from_lengths(_document_lengths(sizes.tokens, 512, seed), device)
        inputs, upstream = _inputs(case, segments, torch.bfloat16, device)
        _with_gradients(lambda *x, here=segments: _attend(x, here, case, backend), inputs, upstream)
        compiled.append(counters["stats"]["unique_graphs"])
    require(len(set(compiled)) == 1, f"graphs compiled after each of 4 rows: {compiled}")
