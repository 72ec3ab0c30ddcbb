"""The same documents, model and optimizer by others: transformers on padded batches, and a plain loop on packed rows.

All train in bf16 by autocast with weights in fp32, fused AdamW and a clipped gradient, and take the same documents in
the same steps. Speed counts tokens of documents alone. `padded` lays documents side by side in the order in which they
come; `padded, by length` sorts those of a step first and fills batches up to a number of tokens, padding included: more
than most data collators do.

Shape legend: B documents of a batch, n tokens of the longest.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu.device_part import device_of
from gpu.fits import Sizes, check_losses, sizes_of, try_run
from gpu.models import run_config
from gpu.record import Report, require
from gpu.timing import wait
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmt_train.config import RunConfig
from llmt_train.data.batch import PackedBatch
from llmt_train.data.stream import train_batches
from llmt_train.model.head import likely_head, model_scores
from llmt_train.model.load import load_model
from llmt_train.optim import build_optimizer
from llmt_train.setup import open_data

Loss = Callable[[Any, Any], Tensor]
"""Of a model and a micro-batch, whose share of the step's mean it is."""

_SAME, _TOLERANCE = 4, 3e-3
"""Steps whose losses must be those of `fit`, and by how much they may differ, as a share."""


class Step(NamedTuple):
    """An optimizer step."""

    batches: list[Any]
    tokens: int
    """Of documents."""


class Padded(NamedTuple):
    """A batch as transformers trains on it."""

    input_ids: Tensor
    """[B, n]."""
    attention_mask: Tensor
    """[B, n]; 1 where there is a token."""
    labels: Tensor
    """[B, n]; -100 where there is none."""
    targets: int
    """Of the whole step."""


def run(report: Report, profile: str) -> None:
    """Train the same model by each way."""
    sizes, device = sizes_of(profile), device_of(profile)
    wanted = [record["loss"] for record in try_run(report, "llmt-train fit", sizes, sizes.llama)]
    config = run_config(sizes.llama, "none", sizes.length, sizes.step, sizes.micro, train={"steps": sizes.steps})
    packed = list(_packed_steps(config))
    drawn = load_model(config.model.model_dump(), seed=config.train.seed)
    for name, loss in {"plain loop, llmt's head": _of_our_head, "plain loop, all logits": _of_all_logits}.items():
        with report.case(name) as values:
            model = copy.deepcopy(drawn).to(device)
            losses = _measure(model, packed, loss, config, sizes.warmup, device, values)
            _check_same_losses(losses, wanted)
    _try_padded(report, packed, config, sizes, device)


def _check_same_losses(found: Sequence[float], wanted: Sequence[float]) -> None:
    """The first steps are the same: another road to the same gradients. Later ones drift apart by rounding."""
    shares = [abs(a / b - 1) for a, b in zip(found[:_SAME], wanted[:_SAME], strict=True)]
    require(max(shares) <= _TOLERANCE, f"losses {found[:_SAME]}, but those of fit are {wanted[:_SAME]}")


def _try_padded(report: Report, packed: Sequence[Step], config: RunConfig, sizes: Sizes, device: str) -> None:
    most = sizes.length * sizes.micro
    cuts = {
        "padded": lambda texts: _in_order(texts, sizes.micro),
        "padded, by length": lambda texts: _by_length(texts, most),
    }
    for name, cut in cuts.items():
        with report.case(name) as values:
            steps = [_padded_step(step, cut) for step in packed]
            cells = sum(batch.input_ids.numel() for step in steps for batch in step.batches)
            _measure(_padded_model(sizes, device), steps, _of_transformers, config, sizes.warmup, device, values)
            values["fill"] = sum(step.tokens for step in steps) / cells


def _packed_steps(config: RunConfig) -> Iterator[Step]:
    """The steps of a run, as `fit` takes them."""
    dataset, plan = open_data(config)
    batches = list(train_batches(dataset.train, plan))
    for first in range(0, len(batches), plan.accumulation):
        part = batches[first : first + plan.accumulation]
        yield Step(part, sum(sum(batch.segment_lengths) for batch in part))


def _padded_step(step: Step, cut: Callable[[list[Tensor]], list[list[Tensor]]]) -> Step:
    texts = [text for batch in step.batches for text in _documents(batch)]
    return Step([_pad(group, sum(len(text) - 1 for text in texts)) for group in cut(texts)], step.tokens)


def _documents(batch: PackedBatch) -> Iterator[Tensor]:
    """The documents of a packed micro-batch, without what pads its rows."""
    pieces = batch.input_ids[0].split(batch.lengths)
    yield from (piece for piece, source in zip(pieces, batch.segment_source.tolist(), strict=True) if source >= 0)


def _in_order(texts: list[Tensor], count: int) -> list[list[Tensor]]:
    """Groups of as many documents as a packed micro-batch has rows: when all are long they just fit, too."""
    return [texts[first : first + count] for first in range(0, len(texts), count)]


def _by_length(texts: list[Tensor], most: int) -> list[list[Tensor]]:
    """Groups of documents of like lengths, each of at most ``most`` tokens, padding included."""
    groups: list[list[Tensor]] = []
    for text in sorted(texts, key=len, reverse=True):
        if not groups or (len(groups[-1]) + 1) * len(groups[-1][0]) > most:
            groups.append([])
        groups[-1].append(text)
    return groups


def _pad(texts: list[Tensor], targets: int) -> Padded:
    pad = torch.nn.utils.rnn.pad_sequence
    ids, mask = pad(texts, batch_first=True), pad([torch.ones_like(text) for text in texts], batch_first=True)
    return Padded(ids, mask, ids.masked_fill(mask == 0, -100), targets)


def _padded_model(sizes: Sizes, device: str) -> Any:
    keys = dict(sizes.llama)
    config = AutoConfig.for_model(keys.pop("model_type"), **keys, use_cache=False)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()


def _of_our_head(model: Any, batch: PackedBatch) -> Tensor:
    scores = model_scores(model, likely_head(model), batch, is_uniform=True)
    return -scores.logps.sum() / batch.denominators["targets"]


def _of_all_logits(model: Any, batch: PackedBatch) -> Tensor:
    output = model(batch.input_ids, position_ids=batch.position_ids, segments=batch.segments(), use_cache=False)
    return F.cross_entropy(output.logits[0].float(), batch.labels[0], reduction="sum") / batch.denominators["targets"]


def _of_transformers(model: Any, batch: Padded) -> Tensor:
    return model(
        batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, num_items_in_batch=batch.targets
    ).loss


def _measure(
    model: Any,
    steps: Sequence[Step],
    loss: Loss,
    config: RunConfig,
    warmup: int,
    device: str,
    values: dict[str, Any],
) -> list[float]:
    """Train; measure tokens of documents per second and peak memory; return the losses."""
    optimizer = build_optimizer(model, config.optim)
    losses, seconds = [], []
    for step in steps:
        wait(device)
        begin = time.perf_counter()
        losses.append(_train_step(model, optimizer, step, loss, device))
        wait(device)
        seconds.append(time.perf_counter() - begin)
    speeds = [step.tokens / taken for step, taken in zip(steps, seconds, strict=True)]
    values["tokens/s"] = statistics.median(speeds[warmup:])
    values["peak GB"] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    values["loss"] = f"{losses[0]:.3f} -> {losses[-1]:.3f}"
    check_losses(losses)
    return losses


def _train_step(model: Any, optimizer: torch.optim.Optimizer, step: Step, loss: Loss, device: str) -> float:
    """Return the step's loss, which waits for the device."""
    parts = []
    for batch in step.batches:
        moved = batch.to(device) if isinstance(batch, PackedBatch) else _moved(batch, device)
        with torch.autocast(device, torch.bfloat16):
            part = loss(model, moved)
        part.backward()
        parts.append(part.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack(parts).sum().item()


def _moved(batch: Padded, device: str) -> Padded:
    return Padded(*(x.to(device, non_blocking=True) for x in batch[:3]), batch.targets)
