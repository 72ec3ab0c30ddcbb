"""Which modules get a fused kernel, and that its formula is theirs; plain torch stands in for Liger's kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from train.tiny_models import CONFIGS, packed, tiny

from llmt_shared.errors import ConfigError
from llmt_train.model.liger import Kernels, use_liger
from llmt_train.model.load import load_skeleton


def rms_norm(hidden, weight, eps, offset, casting):
    """As Liger documents it: `llama` rounds before the weight, `gemma` after."""
    x = hidden.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if casting == "llama":
        return x.to(hidden.dtype) * (offset + weight)
    return (x * (offset + weight.float())).to(hidden.dtype)


calls = []
KERNELS = Kernels(
    lambda *arguments: calls.append("norm") or rms_norm(*arguments),
    lambda gate, up: calls.append("silu") or F.silu(gate) * up,
    lambda gate, up: calls.append("gelu") or F.gelu(gate, approximate="tanh") * up,
)


def drawn(family, dtype=torch.float32):
    """Norms have drawn weights too: at 1 (or 0, for Gemma) an offset would not be seen."""
    model = tiny(family, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def run(model):
    batch = packed([[20, 4], [7]], 24)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments()).logits
    logits.float().square().mean().backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


# Two layers; with norms of queries and keys in Qwen-3, and twice as many in Gemma-2 and OLMo-2.
MODULES = {"llama": 7, "mistral": 7, "phi3": 7, "qwen3": 11, "gemma2": 11, "olmo2": 11, "granite": 7}


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_gated_mlps_are_exchanged_and_compute_the_same(family, dtype):
    plain, fused = drawn(family, dtype), drawn(family, dtype)
    assert use_liger(fused, KERNELS) == MODULES[family]
    calls.clear()
    tolerance = 1e-6 if dtype == torch.float32 else 5e-2
    (logits, gradients), (found, fused_gradients) = run(plain), run(fused)
    torch.testing.assert_close(found, logits, rtol=tolerance, atol=tolerance * logits.abs().max().item())
    for a, b in zip(fused_gradients, gradients, strict=True):
        assert (a - b).norm() <= tolerance * max(b.norm(), 1e-3)
    assert len(calls) == MODULES[family]
    assert set(calls) == {"norm", "gelu" if family == "gemma2" else "silu"}


@pytest.mark.parametrize("family", MODULES)
def test_a_model_without_weights_gets_the_same_kernels(family):
    skeleton = load_skeleton({"from_config": {"model_type": family, **CONFIGS[family]}})
    assert use_liger(skeleton, KERNELS) == MODULES[family]
    whole = drawn(family)
    use_liger(whole, KERNELS)
    changed = [
        [name for name, module in model.named_modules() if "forward" in module.__dict__] for model in (skeleton, whole)
    ]
    assert changed[0] == changed[1]
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_other_models_of_the_process_keep_what_they_have():
    use_liger(tiny("llama"), KERNELS)
    calls.clear()
    run(tiny("llama"))
    assert calls == []


def test_a_module_that_computes_something_else_keeps_it():
    model = tiny("llama")
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    model.model.norm.forward = lambda hidden: hidden * model.model.norm.weight
    assert use_liger(model, KERNELS) == MODULES["llama"] - 2


def test_a_copy_of_a_model_has_kernels_on_its_own_weights():
    model = drawn("llama")
    use_liger(model, KERNELS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(twin)[0], run(drawn("llama"))[0])


def test_a_model_without_such_modules_is_refused():
    with pytest.raises(ConfigError, match="gpt2 has no norm or MLP that Liger's kernels compute"):
        use_liger(tiny("gpt2"), KERNELS)


def test_without_a_gpu_the_kernels_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"train.liger: needs a CUDA device, found cpu"):
        use_liger(tiny("llama"), device="cpu")
