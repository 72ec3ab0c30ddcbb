"""The chunked head against the whole matrix of logits, and against every model's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from train.tiny_models import CONFIGS, packed, tiny

from llmt_shared.segments import IGNORE
from llmt_train.model.head import HeadSpec, check_head, find_head, model_scores, token_scores

N, H, V = 23, 12, 37


def make(dtype=torch.float64, bias=True, scale=1.0, softcap=None):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(H, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,), generator=generator)
    labels[torch.randperm(N, generator=generator)[: N // 3]] = IGNORE
    return hidden, HeadSpec(linear, scale, softcap), labels


def token_logps(hidden, head, labels, chunk=1024):
    return token_scores(hidden, head, labels, (labels != IGNORE).nonzero()[:, 0], chunk=chunk).logps


def model_logps(model, head, batch):
    return model_scores(model, head, batch).logps


def whole(hidden, head, labels):
    """All logits at once, by autograd."""
    logits = head.linear(hidden) * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    picked = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels == IGNORE, 0.0, picked)


def value_and_gradients(function, hidden, head, labels):
    upstream = torch.linspace(-2, 3, N, dtype=torch.float64)
    value = function(hidden, head, labels)
    return [value, *torch.autograd.grad(value, [hidden, *head.linear.parameters()], upstream.to(value.dtype))]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.125, None), (1.0, 3.0), (0.5, 2.0)])
def test_values_and_gradients_equal_the_whole_matrix(chunk, bias, scale, softcap):
    problem = make(bias=bias, scale=scale, softcap=softcap)
    wanted = value_and_gradients(whole, *problem)
    got = value_and_gradients(lambda *x: token_logps(*x, chunk=chunk), *problem)
    assert got[0].dtype == torch.float64
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 2.0)])
def test_every_score_and_its_gradient_equal_the_whole_matrixs(chunk, which, scale, softcap):
    """Alone and together: what is not used has no gradient."""

    def chunked(hidden, head, labels):
        places = (labels != IGNORE).nonzero()[:, 0]
        scores = token_scores(hidden, head, labels, places, with_mean=True, chunk=chunk)
        return sum((1 + i) * scores[i] ** 2 for i in which)

    def plain(hidden, head, labels):
        logits = head.linear(hidden) * head.scale
        logits = head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
        lse = logits.logsumexp(-1)
        scores = [whole(hidden, head, labels), lse, logits.mean(-1) - lse]
        return sum((1 + i) * torch.where(labels == IGNORE, 0.0, scores[i]) ** 2 for i in which)

    problem = make(scale=scale, softcap=softcap)
    for a, b in zip(value_and_gradients(chunked, *problem), value_and_gradients(plain, *problem), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_fp32_stays_within_its_rounding():
    problem = make(dtype=torch.float32, softcap=3.0)
    for a, b in zip(value_and_gradients(token_logps, *problem), value_and_gradients(whole, *problem), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_softmax_of_bf16_logits_is_taken_in_fp32():
    hidden, head, labels = make(dtype=torch.bfloat16)
    logps = token_logps(hidden, head, labels)
    wanted = head.linear(hidden).float().log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, torch.where(labels == IGNORE, 0.0, wanted), rtol=0, atol=1e-5)


def test_gradients_under_autocast_keep_the_parameters_dtype():
    problem = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(*problem)
    assert logps.dtype == torch.float32
    hidden, head, _ = problem
    grads = torch.autograd.grad(logps.sum(), [hidden, *head.linear.parameters()])
    wanted = torch.autograd.grad(whole(*problem).sum(), [hidden, *head.linear.parameters()])
    for a, b in zip(grads, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 2e-2 * b.norm()


def test_chunks_are_summed_in_fp32_for_bf16_weights():
    """With one token per chunk, a bf16 sum of 4096 equal gradients would stop growing at 256 of them."""
    linear = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(linear.weight)
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    token_logps(hidden, HeadSpec(linear), torch.zeros(4096, dtype=torch.int64), chunk=1).sum().backward()
    assert linear.weight.grad[:, 0].tolist() == [2048.0, -2048.0]


def test_without_labels_everything_is_an_exact_zero_attached_to_the_graph():
    hidden, head, labels = make()
    logps = token_logps(hidden, head, torch.full_like(labels, IGNORE))
    assert logps.shape == (N,)
    for x in [logps, *torch.autograd.grad(logps.sum(), [hidden, *head.linear.parameters()])]:
        assert not x.any()


def test_a_frozen_head_gets_no_gradient_and_passes_one_on():
    hidden, head, labels = make()
    head.linear.requires_grad_(False)
    token_logps(hidden, head, labels).sum().backward()
    assert hidden.grad.any()
    assert head.linear.weight.grad is None


@given(st.lists(st.booleans(), min_size=N, max_size=N), st.integers(1, N + 3))
def test_any_labels_and_any_chunk(is_target, chunk):
    hidden, head, labels = make()
    labels = torch.where(torch.tensor(is_target), labels.clamp(min=0), IGNORE)
    torch.testing.assert_close(token_logps(hidden, head, labels, chunk), whole(hidden, head, labels))


def test_no_more_than_a_chunk_of_logits_is_saved_for_backward():
    hidden, head, labels = make()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        token_logps(hidden, head, labels, chunk=2)
    assert max(saved) < (labels != IGNORE).sum() * V


HEADS = {
    "llama": (1.0, None),
    "gpt2": (1.0, None),
    "gemma2": (1.0, 30.0),
    "granite": (1 / 8, None),
    "cohere": (0.0625, None),
    "phi": (1.0, None),  # its head has a bias
}


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_and_caps_of_families_are_found(family, dtype):
    model = tiny(family, dtype=dtype)
    head = find_head(model)
    assert (head.scale, head.softcap) == HEADS[family]
    assert (head.linear.bias is not None) == (family == "phi")


@pytest.mark.parametrize("family", HEADS)
def test_log_probabilities_are_those_of_the_models_own_logits(family):
    model, batch = tiny(family), packed([[20, 1, 9], [30]], 32)
    own = model_logps(model, None, batch)
    torch.testing.assert_close(model_logps(model, find_head(model), batch), own, rtol=0, atol=1e-5)
    assert own.shape == (64,)
    assert torch.equal(own != 0, batch.labels[0] != IGNORE)


@pytest.mark.parametrize(
    ("family", "change"), [("gemma2", {"softcap": None}), ("granite", {"scale": 1.0}), ("llama", {"softcap": 30.0})]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_factor_or_cap_is_noticed_in_a_freshly_drawn_model(family, change, dtype):
    model = tiny(family, dtype=dtype)
    good = find_head(model)
    wrong = HeadSpec(**{"linear": good.linear, "scale": good.scale, "softcap": good.softcap, **change})
    assert check_head(model, good)
    assert not check_head(model, wrong)


class OddHead(type(tiny("llama"))):
    """A llama whose logits are no linear layer of the hidden states, as nothing in its config tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * output.logits.abs()
        return output


def odd_model():
    model = tiny("llama")
    model.__class__ = OddHead
    return model


def test_an_unknown_head_falls_back_to_the_models_own_logits_with_a_warning():
    with pytest.warns(UserWarning, match="llama: its logits are not a linear layer"):
        assert find_head(odd_model()) is None


def test_the_fall_back_is_right_in_values_and_gradients():
    model, batch = odd_model().eval(), packed([[20, 1, 9], [30]], 32)
    logps = model_logps(model, None, batch)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments()).logits[0]
    loss = nn.functional.cross_entropy(logits, batch.labels[0], ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(-logps.sum(), loss)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(-logps.sum(), parameters), torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_model_that_gives_all_logits_is_cut_to_the_labels():
    model, batch = tiny("llama"), packed([[20, 1, 9], [30]], 32)
    forward = model.forward
    wanted = model_logps(model, None, batch)
    model.forward = lambda logits_to_keep, **keywords: forward(**keywords)
    torch.testing.assert_close(model_logps(model, None, batch), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head_is_known", [True, False])
def test_an_empty_micro_batch_gives_zero_to_every_parameter(head_is_known):
    model = tiny("llama")
    head = find_head(model) if head_is_known else None
    model_logps(model, head, packed([[]], 16, targets=5.0)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_finding_a_head_changes_no_mode_and_leaves_no_hook():
    model = tiny("gpt2")
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    find_head(model)
    assert [m.training for m in model.modules()] == modes
    assert not model.transformer._forward_hooks


def test_every_tiny_family_is_covered():
    assert set(HEADS) <= set(CONFIGS)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 2.0)])
def test_gradients_made_early_equal_the_whole_matrixs(chunk, bias, scale, softcap):
    hidden, head, labels = make(bias=bias, scale=scale, softcap=softcap)
    places, inputs = (labels != IGNORE).nonzero()[:, 0], [hidden, *head.linear.parameters()]
    early = token_scores(hidden, head, labels, places, is_uniform=True, chunk=chunk).logps
    wanted = torch.autograd.grad(whole(hidden, head, labels).sum() * -0.37, inputs)
    for a, b in zip(torch.autograd.grad(early.sum() * -0.37, inputs), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_made_early_refuse_a_loss_that_is_not_uniform():
    hidden, head, labels = make()
    places = (labels != IGNORE).nonzero()[:, 0]
    logps = token_scores(hidden, head, labels, places, is_uniform=True).logps
    with pytest.raises(AssertionError):
        (logps * torch.arange(N)).sum().backward()


def test_no_labels_give_early_gradients_of_zero():
    hidden, head, labels = make()
    logps = token_scores(hidden, head, torch.full_like(labels, IGNORE), torch.arange(0), is_uniform=True).logps
    logps.sum().backward()
    assert all(not x.grad.any() for x in (hidden, *head.linear.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_early_gradients_have_the_dtypes_of_what_they_are_of(dtype):
    hidden, head, labels = make(dtype=dtype)
    places = (labels != IGNORE).nonzero()[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        token_scores(hidden, head, labels, places, is_uniform=True).logps.sum().backward()
    assert {x.grad.dtype for x in (hidden, *head.linear.parameters())} == {dtype}
