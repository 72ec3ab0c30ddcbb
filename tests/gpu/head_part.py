"""Ways from hidden states to a loss: gradients against fp64, time, memory.

Shape legend: T tokens that all have a label, H hidden size, V vocabulary.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu.device_part import device_of
from gpu.exact import FACTOR, compare, error_of, measure
from gpu.record import AbsentError, Report, require
from gpu.timing import median_ms, peak_mb
from torch import Tensor, nn

from llmt_train.model.head import HeadSpec, token_scores


class Sizes(NamedTuple):
    """Of what is measured."""

    tokens: int
    hidden: int
    vocab: int
    repeats: int


SIZES = {
    "dry": {"tiny": Sizes(64, 32, 256, 1)},
    "quick": {"128k": Sizes(8192, 2048, 128_256, 5)},
    "full": {"128k": Sizes(8192, 2048, 128_256, 10), "32k": Sizes(16384, 2304, 32_064, 10)},
}

Way = Callable[[Tensor, nn.Linear, Tensor], Tensor]
"""Of hidden states [T, H] in bf16, an output layer in fp32 and labels [T] to the summed loss, or that of each token."""


def plain(hidden_TH: Tensor, linear: nn.Linear, labels_T: Tensor) -> Tensor:
    """All logits at once, in fp32, as transformers does; each token's loss."""
    return F.cross_entropy(linear(hidden_TH).float(), labels_T, reduction="none")


def any_gradient(hidden_TH: Tensor, linear: nn.Linear, labels_T: Tensor) -> Tensor:
    """llmt's, for a loss that weighs tokens apart."""
    return -token_scores(hidden_TH, HeadSpec(linear), labels_T, _all(labels_T)).logps.sum()


def uniform(hidden_TH: Tensor, linear: nn.Linear, labels_T: Tensor) -> Tensor:
    """llmt's, for a loss that weighs all alike."""
    return -token_scores(hidden_TH, HeadSpec(linear), labels_T, _all(labels_T), is_uniform=True).logps.sum()


def of_liger(hidden_TH: Tensor, linear: nn.Linear, labels_T: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise AbsentError("liger-kernel is not installed")
    if not hidden_TH.is_cuda:
        raise AbsentError("Liger needs a CUDA device")
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    weight = linear.weight.to(hidden_TH.dtype)
    result = LigerFusedLinearCrossEntropyFunction.apply(
        hidden_TH, weight, labels_T, None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32
    )
    return result[0] if isinstance(result, tuple) else result


def of_torch(hidden_TH: Tensor, linear: nn.Linear, labels_T: Tensor) -> Tensor:
    """`F.linear_cross_entropy`, torch >= 2.13."""
    if not hasattr(F, "linear_cross_entropy"):
        raise AbsentError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    weight = linear.weight.to(hidden_TH.dtype)
    return F.linear_cross_entropy(
        hidden_TH, weight, labels_T, reduction="sum", options=nn.LinearCrossEntropyOptions()
    )  # fmt: skip


WAYS: dict[str, Way] = {
    "full cross-entropy": plain,
    "llmt, any gradient": any_gradient,
    "llmt, uniform": uniform,
    "liger fused": of_liger,
    "F.linear_cross_entropy": of_torch,
}


def run(report: Report, profile: str) -> None:
    """Measure every way that is here."""
    device = device_of(profile)
    for size_name, sizes in SIZES[profile].items():
        hidden, linear, labels = _inputs(sizes, device)
        truth = _exact(hidden, linear, labels)
        usual = _work(plain, hidden, linear, labels)()
        for name, way in WAYS.items():
            with report.case(f"{name} {size_name}") as values:
                work = _work(way, hidden, linear, labels)
                _judge(name, work(), usual, truth, values)
                values["ms"] = median_ms(work, device, sizes.repeats)
                values["peak MB"] = peak_mb(work, device)


def _inputs(sizes: Sizes, device: str) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    linear = nn.Linear(sizes.hidden, sizes.vocab, bias=False, device=device)
    nn.init.normal_(linear.weight, std=0.02, generator=generator)
    hidden = torch.randn(sizes.tokens, sizes.hidden, generator=generator, device=device)
    labels = torch.randint(sizes.vocab, (sizes.tokens,), generator=generator, device=device)
    return hidden.bfloat16().requires_grad_(), linear, labels


def _work(way: Way, hidden: Tensor, linear: nn.Linear, labels: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Loss and gradients of hidden states and weights, as in a model that trains in bf16 with weights in fp32."""

    def work() -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, torch.bfloat16):
            loss = way(hidden, linear, labels)
        return (loss.detach(), *torch.autograd.grad(loss.sum(), [hidden, linear.weight]))

    return work


def _judge(
    name: str, found: Sequence[Tensor], usual: Sequence[Tensor], truth: Sequence[Tensor], values: dict[str, Any]
) -> None:
    """Require that llmt's ways are right; of others say how far off they are.

    A sum may happen to be right; so what is allowed is what the tokens' own errors, by plain maths, would add up to if
    all had one sign.
    """
    error = abs(found[0].double().sum().item() / truth[0].sum().item() - 1)
    values["loss error"], allowed = error, FACTOR * error_of(usual[0], truth[0]).norm
    if name.startswith("llmt"):
        require(error <= allowed, f"the loss is off by {error:.1e} of it; allowed {allowed:.1e}")
        compare(found[1:], usual[1:], truth[1:], values)
    else:
        measure(found[1:], usual[1:], truth[1:], values)


def _exact(hidden: Tensor, linear: nn.Linear, labels: Tensor) -> list[Tensor]:
    """The same in fp64, a few tokens at a time, of the weights as they are rounded to bf16."""
    weight = linear.weight.detach().bfloat16().double().requires_grad_()
    losses, of_hidden = [], []
    for part, wanted in zip(hidden.detach().double().split(1024), labels.split(1024), strict=True):
        part.requires_grad_()
        loss = F.cross_entropy(part @ weight.T, wanted, reduction="none")
        loss.sum().backward()
        losses.append(loss.detach())
        of_hidden.append(part.grad)
    return [torch.cat(losses), torch.cat(of_hidden), weight.grad]


def _all(labels_T: Tensor) -> Tensor:
    return torch.arange(labels_T.shape[0], device=labels_T.device)
