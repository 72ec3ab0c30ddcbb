"""How a model makes its logits, and what it thinks of a micro-batch's labels.

Shape legend: N packed tokens, T tokens that have a label, H hidden size, V vocabulary.
"""

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmt_train.attention import Backend, Segments
from llmt_train.data.batch import PackedBatch
from llmt_train.model.load import evaluating, forward_hidden
from llmt_train.model.scores import CHUNK, HeadSpec, Scores, at_least_fp32, logits_of, scatter, token_scores
from llmt_train.parallel import collectives
from llmt_train.parallel.context import WHOLE, TokenSplit
from llmt_train.parallel.mesh import ALONE, Axis
from llmt_train.parallel.sharding import run_forward

__all__ = ["HeadSpec", "Scores", "check_head", "find_head", "likely_head", "logits_at", "model_scores", "token_scores"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest difference of log-probabilities as a share of the largest one; in half precision it is the rounding of the
model's own logits, a hundred times below what a wrong factor makes."""

_PROBES = 16
"""Hidden states by which a head is judged."""


def model_scores(
    model: Any,
    head: HeadSpec | None,
    batch: PackedBatch,
    *,
    attention: Backend = "auto",
    deterministic: bool = False,
    with_mean: bool = False,
    is_uniform: bool = False,
    chunk: int = CHUNK,
) -> Scores:
    """Run the model on a micro-batch and score every label.

    Args:
        model: a causal language model of transformers with packed attention.
        head: as `find_head` found it; ``None`` computes the model's own logits of the labelled tokens, all at once.
        batch: the micro-batch, this rank's tokens of it; one without labels gives zeros that still depend on every
            parameter used.
        attention: backend of the attention, or ``auto``.
        deterministic: see `varlen_attention`.
        with_mean: whether ``mean_logps`` is wanted (label smoothing is all that needs it).
        is_uniform: whether the loss is the sum of the log-probabilities times one number; see `token_scores`.
        chunk: tokens whose logits are held at a time.
    """
    segments, labels, places = batch.segments(attention, deterministic), batch.labels[0], batch.label_places
    if head is None:
        logits_TV = _own_logits(model, batch, segments, places)
        return scatter(_scores_of(logits_TV, labels[places], with_mean), places, labels.shape[0])

    def scores() -> Scores:
        hidden = forward_hidden(model, batch, segments)
        return token_scores(hidden, head, labels, places, with_mean=with_mean, is_uniform=is_uniform, chunk=chunk)

    return run_forward(model, scores)


@torch.no_grad()
def logits_at(model: Any, head: HeadSpec | None, batch: PackedBatch, segments: Segments, places: Tensor) -> Tensor:
    """Return the logits of this rank's tokens at ``places`` [T], all held at once: [T, V] in at least fp32."""
    if head is None:
        logits = _own_logits(model, batch, segments, places)
        return logits.to(at_least_fp32(logits.dtype))
    return run_forward(model, lambda: logits_of(head.whole(forward_hidden(model, batch, segments))[places], head))


def find_head(model: Any, split: TokenSplit = WHOLE) -> HeadSpec | None:
    """Find how a model makes its logits, and prove it on hidden states large enough to show a cap or a factor.

    Args:
        model: from `load_model`; if it is cut over devices, all its ranks call this.
        split: ranks that share its layers and tokens.

    Returns:
        What `check_head` agrees with; ``None``, with a warning, where nothing does: then the model's own logits serve,
        right but not chunked.
    """
    for head in _candidates(model, split):
        if check_head(model, head):
            return head
    warnings.warn(
        f"{model.config.model_type}: its logits are not a linear layer of the hidden states with a known factor or "
        "cap; the logits of all targets of a micro-batch are held at once, which needs more memory",
        stacklevel=2,
    )
    return None


def likely_head(model: Any, split: TokenSplit = WHOLE) -> HeadSpec | None:
    """Return what `find_head` tries first, unproven: for a model without weights, whose memory is all that is asked."""
    return next(_candidates(model, split), None)


@torch.no_grad()
def check_head(model: Any, head: HeadSpec) -> bool:
    """Return whether the head gives the log-probabilities of the model's own logits, on random hidden states."""
    generator = torch.Generator().manual_seed(0)
    probe = run_forward(model, lambda: _probe(head, generator))
    part, places = collectives.split(probe, head.tokens, 0), torch.arange(len(probe), device=probe.device)
    logits = _logits_of(model, part, len(probe))
    labels = torch.randint(logits.shape[1], (len(probe),), generator=generator).to(probe.device)
    wanted = _scores_of(logits, labels, with_mean=False).logps
    found = run_forward(model, lambda: token_scores(part, head, labels, places).logps)
    error = (wanted - found).abs().max() / wanted.abs().max()
    return bool(error <= _TOLERANCE[probe.dtype])


def _probe(head: HeadSpec, generator: torch.Generator) -> Tensor:
    """Hidden states, the same on every rank: as many as divide by those that share tokens.

    Their logits are about 20: far into the bend of a cap (30 is usual), whatever the scale of the weights.
    """
    weight, _ = head.parameters()
    count = -(-_PROBES // head.tokens.size) * head.tokens.size
    probe = torch.randn(count, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    spread = collectives.total(F.linear(probe, weight).float().std(), head.axis) / head.axis.size
    return probe * (20 / spread.clamp(min=1e-6)).to(probe.dtype)


def _candidates(model: Any, split: TokenSplit) -> Iterator[HeadSpec]:
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear) or model.get_decoder() is model:
        return
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value not in (0, 1):
            scales += [1 / value, float(value)]  # Granite divides by what HyperCLOVA X multiplies with
    axis = _axis_of(linear.weight, split.tp)
    for scale in scales:
        yield HeadSpec(linear, scale, softcap, axis, split.tp if split.sp else ALONE)


def _axis_of(weight: Tensor, tp: Axis) -> Axis:
    """The ranks over which the output layer's rows are cut: none, where the vocabulary does not divide by them."""
    if not isinstance(weight, DTensor) or "tp" not in (names := weight.device_mesh.mesh_dim_names or ()):
        return ALONE
    return tp if weight.placements[names.index("tp")].is_shard(0) else ALONE


def _logits_of(model: Any, hidden: Tensor, num_tokens: int) -> Tensor:
    """Logits [N, V] that the model itself makes of given hidden states, which replace its decoder's.

    Args:
        model: called as a whole.
        hidden: what this rank's decoder would give of N tokens.
        num_tokens: N.
    """

    def replace(module: nn.Module, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = hidden[None]
        return output

    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device=hidden.device)
    positions = torch.arange(num_tokens, device=ids.device)[None]
    segments = Segments.from_lengths([num_tokens], hidden.device)
    with evaluating(model):
        handle = model.get_decoder().register_forward_hook(replace)
        try:
            output = model(input_ids=ids, position_ids=positions, segments=segments)
        finally:
            handle.remove()
    return cast("Tensor", output.logits[0])


def _own_logits(model: Any, batch: PackedBatch, segments: Segments, kept: Tensor) -> Tensor:
    """[T, V] of the tokens at ``kept``; models that cannot leave out tokens give all, which are then cut."""
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        segments=segments,
        use_cache=False,
        logits_to_keep=kept,
    )
    logits: Tensor = output.logits[0]
    return logits if logits.shape[0] == kept.shape[0] else logits[kept]


def _scores_of(logits_TV: Tensor, labels_T: Tensor, with_mean: bool) -> Scores:
    logits = logits_TV.to(at_least_fp32(logits_TV.dtype))
    lse = logits.logsumexp(-1)
    return Scores(logits.gather(1, labels_T[:, None])[:, 0] - lse, lse, logits.mean(-1) - lse if with_mean else None)
