"""The probe that runs before training: can a document of a packed row see another one?

Models differ in how they reach their attention; some ignore a registered function, or restart positions in vain, and
say nothing. So the model is asked: a pack of two documents, one of which changes; the other's logits must not move.
How much they would move without borders is measured too, by the same pack as one document: the size of a leak
depends on the weights, and in a freshly drawn model it is small.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmt_shared.errors import ConfigError
from llmt_train.model.load import evaluating, whole_logits
from llmt_train.parallel.context import WHOLE, TokenSplit

Document = NDArray[np.int64]
"""Tokens."""

_LENGTHS = (19, 23)
"""Tokens of the probe's documents, longer than the windows of small models."""

_LEAK = 1e-3
"""Share of a full leak that counts as one: less than what a single token too many lets through."""

_ALONE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference between a document packed and alone, as a share of its logits' standard deviation: rounding,
for the two runs have different shapes. The change of a neighbour is the sharper test, and runs on equal shapes."""


class _Probe(NamedTuple):
    """A model's answers."""

    moved: float
    """Change of a document's logits when its neighbour changed."""
    leak: float
    """The same in one document without borders: what a leak looks like."""
    apart: float
    """Difference of a document's logits packed and alone."""
    spread: float
    """Standard deviation of the logits: what the others are measured by."""


def check_isolation(
    model: Any,
    *,
    attention: str = "auto",
    compute: torch.dtype | None = None,
    split: TokenSplit = WHOLE,
    device: torch.device | None = None,
) -> None:
    """Refuse a model that lets documents of a row see each other; runs in evaluation mode and restores every mode.

    Args:
        model: from `load_model`, on the device where it will train; a vocabulary of at least 2.
        attention: backend of the run.
        compute: dtype of the run's arithmetic where it is not that of the parameters.
        split: ranks that share the model's layers and tokens; all of them call this.
        device: where the model computes; ``None`` is where its embeddings lie.

    Raises:
        ConfigError: the model cannot run on packed rows, or a document saw another; it names the model and what moved.
    """
    name = model.config.model_type
    embeddings = model.get_input_embeddings().weight
    place = embeddings.device if device is None else device
    logits = partial(_logits, model, device=place, attention=attention, split=split)
    documents = _documents(embeddings.shape[0])
    try:
        with evaluating(model):
            probes = [_probe(logits, documents, changed) for changed in (0, 1)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises here, it is why it cannot train on packed rows
        raise ConfigError(f"{name}: cannot run on packed rows: {error}; {WAY_OUT}") from error
    dtype = next(model.parameters()).dtype if compute is None else compute
    for probe, changed, watched in zip(probes, ("earlier", "later"), ("later", "earlier"), strict=True):
        _judge(probe, name, changed, watched, dtype)


WAY_OUT = "choose a model family with a standard attention (llama, qwen, mistral, phi3, gemma, gpt2, ...)"


def _documents(vocab_size: int) -> tuple[list[Document], list[Document]]:
    """Two documents, and for each another text of the same length that differs in every token."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(vocab_size, size=length) for length in _LENGTHS]
    others = [(text + generator.integers(1, vocab_size, size=len(text))) % vocab_size for text in texts]
    return texts, others


def _probe(
    logits: Callable[[Sequence[Document]], Tensor], documents: tuple[list[Document], list[Document]], changed: int
) -> _Probe:
    """Change one document (0 or 1) of the pack and watch the other."""
    texts, others = documents
    watched = 1 - changed
    mine = slice(0, _LENGTHS[0]) if watched == 0 else slice(_LENGTHS[0], sum(_LENGTHS))
    replaced = [others[i] if i == changed else texts[i] for i in (0, 1)]
    packed, after, alone = logits(texts)[mine], logits(replaced)[mine], logits([texts[watched]])
    # Without borders: as one document, with the changed one in front, for a later one is hidden by causality.
    merged = [logits([np.concatenate([pack[changed], pack[watched]])]) for pack in (texts, replaced)]
    leak = (merged[1] - merged[0])[_LENGTHS[changed] :]
    return _Probe(_largest(after - packed), _largest(leak), _largest(packed - alone), packed.std().item())


def _logits(model: Any, texts: Sequence[Document], **how: Any) -> Tensor:
    """[N, V] in at least fp32 of one row; see `whole_logits`."""
    logits = whole_logits(model, texts, **how)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def _judge(probe: _Probe, name: str, changed: str, watched: str, dtype: torch.dtype) -> None:
    rounding = 16 * torch.finfo(dtype).eps * probe.spread
    # Dense layers give the same numbers for the same shapes: an exact 0 is proof where a leak would show at all.
    is_still = probe.moved == 0 and probe.leak > 0
    if not is_still and probe.leak <= 4 * rounding:
        raise ConfigError(
            f"{name}: isolation cannot be checked: even in one document the first half moves the other's logits by "
            f"only {probe.leak:.1e}, which is rounding in {dtype}; draw larger weights (initializer_range) or load some"
        )
    # `not <=` also refuses NaN.
    if not probe.moved <= max(_LEAK * probe.leak, rounding):
        raise ConfigError(
            f"{name}: documents of a packed row see each other: changing the {changed} of two moved the {watched} "
            f"one's logits by {probe.moved:.1e} (without borders: {probe.leak:.1e}; wanted 0); {WAY_OUT}"
        )
    if not probe.apart <= _ALONE[dtype] * probe.spread:
        raise ConfigError(
            f"{name}: a document packed as the {watched} of two has other logits than alone, by {probe.apart:.1e} "
            f"(their standard deviation: {probe.spread:.1e}): its positions or its attention depend on the row; "
            f"{WAY_OUT}"
        )
