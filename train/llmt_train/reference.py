"""What the reference of DPO says: live, from a frozen model, or precomputed, from an overlay beside the dataset.

An overlay is a folder ``<dataset>.reference/<first 16 digits of the weights' fingerprint>/``. Its reference.json says
what the numbers are of; ``train.npy`` and ``validation.npy`` hold one fp64 sum per segment of the split, NaN where a
segment is no side of a pair (or, until the overlay is complete, not yet computed). Sums are of hundreds of tokens: fp32
would round them by as much as 1e-4, which DPO's beta does not make small enough.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmt_shared.config import StrictModel
from llmt_shared.dataset import Dataset
from llmt_shared.errors import ConfigError, FormatError
from llmt_shared.progress import say
from llmt_train.data.batch import PackedBatch
from llmt_train.model.fill import Where, same_name
from llmt_train.model.head import HeadSpec, model_scores
from llmt_train.model.load import evaluating
from llmt_train.objectives import pair_logps
from llmt_train.parallel.reduction import whole

FORMAT = 1
IDENTITY = "reference.json"


class Identity(StrictModel):
    """reference.json: what an overlay's numbers are of."""

    format: int = FORMAT
    digest: str
    """The dataset's."""
    weights: str
    """`fingerprint` of the model's."""
    model: str
    """As the run named it."""
    precision: str
    """Arithmetic: ``bf16`` or ``fp32``."""
    attention: str
    """Backend, as the run asked for it."""
    complete: bool = False
    sha256: dict[str, str] = Field(default_factory=dict)
    """Of every split's file, once complete."""


def live_reference(
    model: Any,
    head: HeadSpec | None,
    *,
    attention: str = "auto",
    deterministic: bool = False,
    without_adapters: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Callable[[PackedBatch], Tensor]:
    """Return what gives a model's log-probabilities of a micro-batch's pairs: [Q, 2], without gradients or dropout.

    Args:
        model: the reference; or the policy itself, where its adapters can be switched off.
        head: its head.
        attention: backend, or ``auto``.
        deterministic: see `varlen_attention`.
        without_adapters: switches the adapters off while it is entered.
    """

    @torch.no_grad()
    def logps(batch: PackedBatch) -> Tensor:
        with evaluating(model), without_adapters():
            scores = model_scores(model, head, batch, attention=attention, deterministic=deterministic)
        return pair_logps(scores, batch)

    return logps


@torch.no_grad()
def fingerprint(model: nn.Module, where: Where = same_name) -> str:
    """Return a sha256 over names, dtypes, shapes and bytes of a model's parameters; buffers follow from its config.

    It is the same however the model is sharded; all processes call it, and at most two tensors are whole at a time.

    Args:
        model: any; its parameters may be sharded.
        where: as `fill` was given it: layers that were split count as the one they are on disk.
    """
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        found = where(name)
        if found is not None:
            stored, rows = found
            parts.setdefault(stored, []).append((rows.start if rows else 0, parameter.detach()))
    names = sorted(parts)
    tensors = [[part for _, part in sorted(parts[name], key=lambda each: each[0])] for name in names]
    lines = []
    for name, group, digest in zip(names, tensors, _digests(tensors), strict=True):
        shape = [sum(len(part) for part in group), *group[0].shape[1:]] if len(group) > 1 else list(group[0].shape)
        lines.append(f"{name} {group[0].dtype} {shape} {digest}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digests(tensors: Sequence[Sequence[Tensor]]) -> list[str]:
    """Of tensors that lie in parts, one below the other; every process hashes some."""
    shared = any(isinstance(part, DTensor) for parts in tensors for part in parts)
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    most = 1 if world > 1 else os.cpu_count() or 1  # whole tensors that wait to be hashed
    found = torch.zeros(len(tensors), 32, dtype=torch.int64)
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(most) as pool:  # hashing lets go of the interpreter lock
        for number, parts in enumerate(tensors):
            full = [whole(part) for part in parts]
            if number % world == rank:
                if len(waiting) == most:
                    waiting.popleft().result()
                waiting.append(pool.submit(_hash, full, found[number]))
    for each in waiting:
        each.result()
    if world > 1:
        total = found.to(tensors[0][0].device)
        dist.all_reduce(total)
        found = total.cpu()
    return [bytes(digest.tolist()).hex() for digest in found]


def _hash(parts: Sequence[Tensor], digest: Tensor) -> None:
    """Write the sha256 of tensors that lie one below the other: 32 bytes."""
    sha256 = hashlib.sha256()
    for part in parts:
        data: NDArray[np.uint8] = part.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        sha256.update(data.data)
    digest[:] = torch.tensor(list(sha256.digest()))


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file of an overlay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def overlay_path(dataset: Path, weights: str) -> Path:
    """Return the folder of the overlay that belongs to a dataset and to weights."""
    return dataset.with_name(f"{dataset.name}.reference") / weights[:16]


def open_overlay(dataset: Dataset, wanted: Identity) -> dict[str, Callable[[NDArray[np.int64]], NDArray[np.float64]]]:
    """Return for each split what looks up log-probabilities: from numbers of segments to as many fp64.

    Args:
        dataset: the run's.
        wanted: what the run needs; another precision or attention backend is told on stderr, and served.

    Raises:
        ConfigError: there is no complete overlay for this dataset and these weights; it names those that are there.
        FormatError: the overlay is damaged.
    """
    folder = overlay_path(dataset.folder, wanted.weights)
    found = read_identity(folder)
    if found is None or not found.complete or (found.digest, found.weights) != (wanted.digest, wanted.weights):
        raise ConfigError(_no_overlay(folder, found, wanted))
    for name in ("precision", "attention"):
        before, now = getattr(found, name), getattr(wanted, name)
        if before != now:
            text = f"the reference was computed with {name} {before}, the policy runs with {now}"
            say(f"warning: {folder}: {text}")
    return {name: _lookup(folder / f"{name}.npy", found.sha256.get(name)) for name in dataset.manifest.splits}


def check_overlay(dataset: Dataset) -> None:
    """Refuse a dataset that has no finished overlay of any weights: what can be said without loading them.

    Raises:
        ConfigError: naming the command that writes one.
        FormatError: an overlay is damaged.
    """
    folders = _siblings(overlay_path(dataset.folder, "any"))
    found = [identity for folder in folders if (identity := read_identity(folder)) is not None]
    if not any(identity.complete and identity.digest == dataset.digest for identity in found):
        raise ConfigError(
            f"dpo.reference: precomputed: no finished reference log-probs lie beside {dataset.path}; run `llmt-train "
            "ref --config` with this config, or set `dpo.reference: model`"
        )


def read_identity(folder: Path) -> Identity | None:
    """Return what an overlay says it is; ``None`` where there is none.

    Raises:
        FormatError: its reference.json is damaged, or of another format.
    """
    path = folder / IDENTITY
    try:
        identity = Identity.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: {str(error).splitlines()[0]}; remove the folder and run `llmt-train ref`") from None
    if identity.format != FORMAT:
        raise FormatError(f"{path}: format {identity.format}; this llmt reads {FORMAT}; run `llmt-train ref` again")
    return identity


def _no_overlay(folder: Path, found: Identity | None, wanted: Identity) -> str:
    way_out = "run `llmt-train ref --config` with this config, or set `dpo.reference: model`"
    if found is not None and found.digest != wanted.digest:
        return (
            f"{folder}: is of the dataset with digest {found.digest[:16]}, but the run's has {wanted.digest[:16]}; "
            f"remove it and {way_out}"
        )
    if found is not None and not found.complete:
        return f"{folder}: is not finished; {way_out}"
    others = [identity for each in _siblings(folder) if (identity := read_identity(each)) is not None]
    named = ", ".join(f"{other.model} ({other.weights[:16]})" for other in others) or "none"
    return (
        f"dpo.reference: precomputed: no reference log-probs for {wanted.model} ({wanted.weights[:16]}) beside the "
        f"dataset; there are of: {named}; {way_out}"
    )


def _siblings(folder: Path) -> Iterable[Path]:
    return sorted(folder.parent.iterdir()) if folder.parent.is_dir() else ()


def _lookup(path: Path, sha256: str | None) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    way_out = "remove its folder and run `llmt-train ref` again"
    try:
        digest = sha256_of(path)
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {error}; {way_out}") from None
    if digest != sha256:
        raise FormatError(f"{path}: sha256 {digest[:16]}.. is not that of {IDENTITY}; {way_out}")
    return lambda numbers: np.asarray(values[numbers], np.float64)
