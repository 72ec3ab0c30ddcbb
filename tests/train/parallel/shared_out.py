"""Steps of tiny models whose layers are shared out over ranks, and of the same models in one process."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from train.tiny_models import packed, tiny

from llmt_train.config import CheckpointingConfig
from llmt_train.data.batch import PackedBatch
from llmt_train.model.fused import disk_names, split_fused
from llmt_train.model.recompute import layers_of, recompute
from llmt_train.parallel.layout import Layout
from llmt_train.parallel.mesh import build_mesh
from llmt_train.parallel.tensor import tensor_parallel

VOCAB = 96
"""Two ranks can share it."""
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GRANITE = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama of 97 tokens": {"model_type": "llama", "vocab_size": 97},
    "llama of 97 tokens, tied": {"model_type": "llama", "vocab_size": 97, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3"},
    "phi4-mini": {
        "model_type": "phi3",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    },
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "smollm3": {"model_type": "smollm3"},
    "olmo2": {"model_type": "olmo2"},
    "gemma2": {"model_type": "gemma2", "attn_logit_softcapping": 2.0},
    "granite": {"model_type": "granite", **_GRANITE},
}
_LENGTHS = [[5, 1, 9, 13], [11, 3, 2, 7]]
_LENGTH = 28


class Step(NamedTuple):
    """What a step made of the loss's mean over targets."""

    loss: float
    gradients: dict[str, Tensor]
    """By the names on disk."""
    norm: float
    """As clipping measures it."""


def build(case: str) -> Any:
    """The same weights in every process; none of them is a round number that hides where it is used."""
    model = tiny(**{"vocab_size": VOCAB, **CASES[case]}, initializer_range=0.2)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(index: int, vocabulary: int) -> PackedBatch:
    """A micro-batch; some of its tokens are the padding id, whose embedding gets no gradient.

    One is the first that the second of two ranks has the embedding of: where the padding id is on the first.
    """
    batch = packed([_LENGTHS[index]], _LENGTH, seed=index)
    ids = batch.input_ids % vocabulary
    ids[0, 2] = vocabulary // 2
    labels = batch.labels.where(batch.labels < 0, batch.labels % vocabulary)
    return batch._replace(input_ids=ids.where(ids % 7 != 0, 0), labels=labels)


def logits_of(model: Any, batch: PackedBatch, **keywords: Any) -> Tensor:
    """[N, V]."""
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        segments=batch.segments(),
        use_cache=False,
        **keywords,
    )
    logits: Tensor = output.logits[0]
    return logits


def step_alone(case: str, num_batches: int) -> Step:
    """In one process, without any of it."""
    model = build(case)
    batches = [batch_of(index, model.config.vocab_size) for index in range(num_batches)]
    total = sum(len(batch.label_places) for batch in batches)
    loss = sum(_loss_sum(model, batch) for batch in batches) / total
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return Step(loss.item(), gradients, torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())


def share_out(
    case: str, layout: Layout, sp: bool, policy: str | None = None, compute: torch.dtype | None = None
) -> tuple[Any, Any]:
    """Return a model as a run would have it, and its mesh.

    Args:
        case: of `CASES`.
        layout: of all processes.
        sp: see `tensor_parallel`.
        policy: what is computed again.
        compute: what weights in fp32 are computed with; ``None`` is fp32.
    """
    mesh = build_mesh(layout, "cpu")
    model = build(case)
    split_fused(model)
    tensor_parallel(model, mesh, sp=sp)
    if policy is not None:
        recompute(model, CheckpointingConfig(policy=policy))
    precision = MixedPrecisionPolicy(compute, torch.float32)
    for layer in layers_of(model, ""):
        fully_shard(layer, mesh=mesh.fsdp, mp_policy=precision)
    fully_shard(model, mesh=mesh.fsdp, mp_policy=precision)
    return model, mesh


class Job(NamedTuple):
    """A step to take on ranks."""

    case: str
    sp: bool
    policy: str | None = None
    """What is computed again."""


def steps_shared(jobs: Sequence[Job], layout: Layout) -> dict[Job, Step]:
    """Take steps on every rank, many in one launch."""
    return {job: step_shared(job, layout) for job in jobs}


def step_shared(job: Job, layout: Layout) -> Step:
    """Take a step on this rank, of a loss that is the mean over the targets of all."""
    model, mesh = share_out(job.case, layout, job.sp, job.policy)
    vocabulary = model.config.vocab_size
    batches = [batch_of(index, vocabulary) for index in range(layout.dp)]
    total = sum(len(batch.label_places) for batch in batches)
    loss = _loss_sum(model, batches[mesh.place.shard]) * layout.averaged / total
    loss.backward()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    gradients = fuse(model.config, {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()})
    norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return Step(loss.item(), gradients, norm.full_tensor().item())


def _loss_sum(model: Any, batch: PackedBatch) -> Tensor:
    return F.cross_entropy(logits_of(model, batch), batch.labels[0], reduction="sum")


def fuse(config: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a split model as they are on disk."""
    groups = disk_names(config, state)
    return {
        key: state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        for key, names in groups.items()
    }
