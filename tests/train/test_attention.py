"""Packed attention on the CPU against its definition in fp64; which backend serves where."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import AttentionInterface

from llmt_shared.errors import ConfigError
from llmt_train.attention import (
    BACKENDS,
    NAME,
    Call,
    Machine,
    Segments,
    choose,
    cuda,
    refusal,
    register,
    varlen_attention,
)
from llmt_train.attention.transformers_hook import attend

LENGTHS = [1, 90, 3, 300, 20, 6]
D = 16


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Dense attention with every pair of tokens written out."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(q.shape[0])
    distance = place[:, None] - place[None]
    seen = (segments.ids[:, None] == segments.ids[None]) & (distance >= 0)
    if window:
        seen &= distance < window
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1)[..., : q.shape[0]], v)


def random_qkv(
    n: int, heads: int, kv_heads: int, value_dim: int = D, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, heads, D), (n, kv_heads, D), (n, kv_heads, value_dim)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def errors(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Relative 2-norms; the largest element where the truth is 0, as for q and k under a window of 1."""
    pairs = [(a.double() - b, b) for a, b in zip(got, wanted, strict=True)]
    return [(d.norm() / b.norm() if b.any() else d.abs().max()).item() for d, b in pairs]


COMBINATIONS = list(itertools.product([4, 2], [None, 1, 7, 64, 1000], [None, 3.0], [False, True]))


@pytest.mark.parametrize(("kv_heads", "window", "softcap", "has_sinks"), COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients_follow_the_definition(kv_heads, window, softcap, has_sinks, dtype):
    segments = Segments.from_lengths(LENGTHS)
    inputs = random_qkv(sum(LENGTHS), 4, kv_heads, dtype=dtype)
    if has_sinks:
        inputs.append(torch.linspace(-1, 2, 4, dtype=dtype).requires_grad_())
    upstream = torch.randn(sum(LENGTHS), 4, D, generator=torch.Generator().manual_seed(1), dtype=dtype)
    sinks = inputs[3] if has_sinks else None
    out = varlen_attention(*inputs[:3], segments, scale=0.3, window=window, softcap=softcap, sinks=sinks)
    got = [out, *torch.autograd.grad(out, inputs, upstream)]

    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference = definition(*exact[:3], segments, 0.3, window, softcap, exact[3] if has_sinks else None)
    wanted = [reference, *torch.autograd.grad(reference, exact, upstream.double())]
    assert max(errors(got, wanted)) <= (1e-5 if dtype == torch.float32 else 1e-12)


def test_bf16_is_within_its_rounding():
    segments = Segments.from_lengths(LENGTHS)
    q, k, v = random_qkv(sum(LENGTHS), 4, 2, dtype=torch.bfloat16)
    out = varlen_attention(q, k, v, segments, window=7, softcap=3.0)
    reference = definition(q.double(), k.double(), v.double(), segments, D**-0.5, 7, 3.0)
    assert out.dtype == torch.bfloat16
    assert max(errors([out], [reference])) <= 1e-2


def test_values_may_be_narrower_than_keys():
    segments = Segments.from_lengths(LENGTHS)
    q, k, v = random_qkv(sum(LENGTHS), 4, 2, value_dim=8)
    for window in (None, 7):
        out = varlen_attention(q, k, v, segments, window=window)
        reference = definition(q.double(), k.double(), v.double(), segments, D**-0.5, window)
        assert out.shape == (sum(LENGTHS), 4, 8)
        assert max(errors([out], [reference])) <= 1e-5


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.none() | st.integers(1, 45), st.booleans())
def test_any_segments_and_any_window(lengths, window, capped):
    segments, softcap = Segments.from_lengths(lengths), 2.0 if capped else None
    q, k, v = random_qkv(sum(lengths), 2, 1, dtype=torch.float64)
    out = varlen_attention(q, k, v, segments, window=window, softcap=softcap)
    torch.testing.assert_close(out, definition(q, k, v, segments, D**-0.5, window, softcap), rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_dropout_drops_weights_and_keeps_their_mean(softcap):
    segments = Segments.from_lengths([60])
    q, k = torch.zeros(60, 1, D), torch.zeros(60, 1, D)
    v = torch.ones(60, 1, D)
    torch.manual_seed(0)
    outs = [varlen_attention(q, k, v, segments, dropout=0.5, softcap=softcap)[59, 0, 0] for _ in range(400)]
    assert torch.stack(outs).std() > 0.05
    assert abs(torch.stack(outs).mean() - 1) < 0.03


# torch's own tracing of its own functions.
_TORCHS_OWN = pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")


@pytest.fixture
def traced_flex(monkeypatch):
    """FlexAttention on the CPU: traced, not made into kernels, and without a backward pass.

    Yields:
        The counters of what was traced: attention and masks.
    """
    counters = {cuda._compiled_flex: CompileCounter(), cuda._compiled_create_mask: CompileCounter()}
    compile_with = torch.compile
    for compiled, counter in counters.items():
        compiled.cache_clear()
        monkeypatch.setattr(cuda.torch, "compile", partial(compile_with, backend=counter))
        compiled()
    torch._dynamo.reset()
    yield list(counters.values())
    torch._dynamo.reset()
    for compiled in counters:
        compiled.cache_clear()


@torch.no_grad()
@_TORCHS_OWN
@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"), [(None, None, False), (7, None, True), (None, 3.0, True), (7, 3.0, False)]
)
@pytest.mark.usefixtures("traced_flex")
def test_flex_follows_the_definition(window, softcap, has_sinks):
    segments = Segments.from_lengths(LENGTHS)
    q, k, v = (x.detach() for x in random_qkv(sum(LENGTHS), 4, 2))
    sinks = torch.linspace(-1, 2, 4) if has_sinks else None
    found = varlen_attention(
        q, k, v, segments, scale=0.3, window=window, softcap=softcap, sinks=sinks, backend=cuda.flex
    )
    assert max(errors([found], [definition(q, k, v, segments, 0.3, window, softcap, sinks).double()])) <= 1e-5


@torch.no_grad()
@_TORCHS_OWN
@pytest.mark.parametrize("window", [None, 7])
def test_flex_needs_no_other_code_for_other_segments(traced_flex, window):
    q, k, v = (x.detach() for x in random_qkv(64, 2, 1))
    for lengths in ([40, 24], [24, 40], [64], [1, 2, 61], [63, 1]):
        varlen_attention(q, k, v, Segments.from_lengths(lengths), window=window, backend=cuda.flex)
    assert [counter.frame_count for counter in traced_flex] == [1, 1]


@torch.no_grad()
@_TORCHS_OWN
def test_flex_has_code_for_rows_of_many_sizes(traced_flex):
    sizes = range(16, 16 + 10)  # torch gives up after 8, if nobody tells it not to
    for n in sizes:
        q, k, v = (x.detach() for x in random_qkv(n, 2, 1))
        varlen_attention(q, k, v, Segments.from_lengths([n]), backend=cuda.flex)
    assert traced_flex[0].frame_count == len(sizes)


def test_dropout_is_the_same_in_the_recomputed_backward():
    segments = Segments.from_lengths([40])
    q, k, v = random_qkv(40, 2, 1, dtype=torch.float64)
    torch.manual_seed(0)
    out = varlen_attention(q, k, v, segments, dropout=0.5, softcap=3.0)
    # The output is linear in the values: with the same weights dropped in both passes, <v, dv> is the sum of outputs.
    (grad,) = torch.autograd.grad(out.sum(), [v])
    torch.testing.assert_close((grad * v).sum(), out.sum())


def test_autocast_brings_queries_keys_and_values_to_one_dtype():
    segments = Segments.from_lengths([5, 4])
    q, k, v = random_qkv(9, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen_attention(q, k, v.bfloat16(), segments, softcap=3.0).dtype == torch.bfloat16


def test_segments_that_do_not_tile_the_row_are_refused():
    with pytest.raises(ValueError, match="segments of 8 tokens for a row of 9"):
        varlen_attention(*random_qkv(9, 2, 1), Segments.from_lengths([5, 3]))


HOPPER = Machine("cuda", (9, 0), frozenset({"flash_attn_interface", "flash_attn", "triton"}))
AMPERE = Machine("cuda", (8, 0), frozenset({"flash_attn", "triton"}))
BARE = Machine("cuda", (8, 0), frozenset({"triton"}))
TURING = Machine("cuda", (7, 5), frozenset({"flash_attn", "triton"}))
HALF = Call(torch.bfloat16, 128, 128)


@pytest.mark.parametrize(
    ("machine", "call", "wanted"),
    [
        (HOPPER, HALF, "flash3"),
        (AMPERE, HALF, "flash2"),
        (BARE, HALF, "varlen"),
        (BARE, HALF._replace(softcap=True), "flex"),
        (TURING, HALF, "flex"),
        (Machine("cuda", (7, 5)), HALF, "sdpa"),
        (Machine("cpu"), HALF, "sdpa"),
        (HOPPER, HALF._replace(dtype=torch.float32), "flex"),
        (HOPPER, HALF._replace(dtype=torch.float64), "sdpa"),
        (HOPPER, HALF._replace(sinks=True), "flex"),
        (HOPPER, HALF._replace(sinks=True, dropout=True), "sdpa"),
        (HOPPER, HALF._replace(dropout=True), "flash2"),
        (HOPPER, HALF._replace(dropout=True, softcap=True), "sdpa"),
        (HOPPER, HALF._replace(head_dim=512, value_dim=512), "flex"),
        (HOPPER, HALF._replace(head_dim=192), "flex"),
        (HOPPER, HALF._replace(deterministic=True), "flash3"),
        (BARE._replace(deterministic_torch=True), HALF._replace(deterministic=True), "varlen"),
    ],
)
def test_auto_takes_the_first_backend_that_can_serve(machine, call, wanted):
    assert choose("auto", call, machine) == wanted


@pytest.mark.parametrize(
    ("backend", "machine", "call", "reason"),
    [
        ("flash3", AMPERE, HALF, "needs a Hopper GPU"),
        ("flash3", HOPPER._replace(modules=frozenset()), HALF, "is not installed"),
        ("flash2", BARE, HALF, "is not installed"),
        ("flash2", AMPERE, HALF._replace(dtype=torch.float32), "needs fp16 or bf16, found torch.float32"),
        ("flash2", AMPERE, HALF._replace(head_dim=100, value_dim=100), "multiple of 8"),
        ("varlen", AMPERE, HALF._replace(softcap=True), "has no soft cap"),
        ("varlen", AMPERE, HALF._replace(dropout=True), "has no attention dropout"),
        ("varlen", AMPERE, HALF._replace(deterministic=True), "use_deterministic_algorithms"),
        ("varlen", TURING, HALF, "needs compute capability 8.0"),
        ("flex", AMPERE, HALF._replace(deterministic=True), "may differ from run to run"),
        ("flash2", AMPERE, HALF._replace(sinks=True), "has no attention sinks"),
        ("flex", Machine("cpu"), HALF, "needs a CUDA device, found cpu"),
    ],
)
def test_a_backend_that_was_asked_for_and_cannot_serve_is_an_error_with_its_reason(backend, machine, call, reason):
    assert reason in str(refusal(backend, call, machine))
    with pytest.raises(ConfigError, match=f"attention: {backend}.*"):
        choose(backend, call, machine)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'flash9' is not one of auto, flash3, flash2, varlen, flex, sdpa"):
        choose("flash9", HALF, HOPPER)
    assert BACKENDS == ("flash3", "flash2", "varlen", "flex", "sdpa")


def test_when_none_can_serve_every_reason_is_named():
    with pytest.raises(ConfigError, match=r"flash3 needs .*flash2 needs .*varlen needs .*flex has .*sdpa is determ"):
        choose("auto", HALF._replace(dtype=torch.float64, deterministic=True), HOPPER)


class Layer(torch.nn.Module):
    """What transformers hands to an attention function."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal


def test_the_function_that_transformers_calls_gives_the_attention_of_the_segments():
    register()
    registered = AttentionInterface()[NAME]
    q, k, v = (x.transpose(0, 1)[None] for x in random_qkv(9, 2, 1))
    segments = Segments.from_lengths([5, 4])
    options = {"scaling": 0.5, "sliding_window": 3, "position_ids": None}
    out, weights = registered(Layer(), q, k, v, None, segments=segments, **options)
    wanted = definition(*(x[0].transpose(0, 1) for x in (q, k, v)), segments, 0.5, 3)
    assert weights is None
    torch.testing.assert_close(out[0], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "keywords", "message"),
    [
        (Layer(), {"segments": None}, "called without segments"),
        (Layer(is_causal=False), {}, "is not causal"),
        (Layer(), {"is_causal": False}, "is not causal"),
        (Layer(), {"attention_mask": torch.ones(1, 1, 9, 9)}, "brings an attention mask of its own"),
        (Layer(), {"position_bias": torch.ones(1, 1, 9, 9)}, "brings a position bias of its own"),
    ],
)
def test_what_packed_attention_cannot_do_it_refuses(layer, keywords, message):
    q, k, v = (x.transpose(0, 1)[None] for x in random_qkv(9, 2, 1))
    with pytest.raises(ConfigError, match=message):
        attend(layer, q, k, v, **{"segments": Segments.from_lengths([9]), **keywords})


def test_more_than_one_row_is_refused():
    q, k, v = (x.transpose(0, 1)[None].expand(2, -1, -1, -1) for x in random_qkv(9, 2, 1))
    with pytest.raises(ValueError, match="a batch of 2 rows"):
        attend(Layer(), q, k, v, segments=Segments.from_lengths([9]))


def test_a_forced_backend_travels_with_the_segments():
    q, k, v = (x.transpose(0, 1)[None] for x in random_qkv(9, 2, 1))
    with pytest.raises(ConfigError, match="flash2 needs a CUDA device, found cpu"):
        attend(Layer(), q, k, v, segments=Segments.from_lengths([9], backend="flash2"))
