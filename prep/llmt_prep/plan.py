"""What a dataset would be: the answer of `pack --dry-run`."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from llmt_prep.config import MixConfig
from llmt_prep.corpus import Corpus
from llmt_prep.order import Documents
from llmt_prep.packing import pack_windows, split_documents
from llmt_prep.report import count, percent, size, table
from llmt_prep.selection import Selected, windows_of_splits
from llmt_shared.config import StrictModel

_BYTES_PER_SEGMENT = 4 + 4 + 8 + 2
_BYTES_PER_ROW = 8 + 4


class SourcePlan(StrictModel):
    """One source's part of the plan; amounts in tokens that land in rows."""

    documents: int
    tokens: int
    """Of all documents, before anything is held out, truncated or dropped."""
    held_out_documents: int
    available: int
    """Tokens of one epoch."""
    wanted: int
    got: int
    epochs: float
    share: float
    """Of the tokens of the training rows."""


class SplitPlan(StrictModel):
    """The rows of one split."""

    rows: int
    tokens: int
    fill: float
    disk: int
    """Bytes."""


class Plan(StrictModel):
    """The whole plan."""

    length: int
    budget: int
    sources: dict[str, SourcePlan]
    splits: dict[str, SplitPlan]


def describe(config: MixConfig, corpus: Corpus, selected: Selected, dtype: np.dtype[Any]) -> Plan:
    """Count the rows by packing lengths; no token is moved."""
    windows = windows_of_splits(config, corpus, selected)
    return Plan(
        length=config.sequence.length,
        budget=selected.mixture.budget,
        sources=_sources(selected),
        splits={name: _split(config, stream, dtype.itemsize) for name, stream in windows.items()},
    )


def render(plan: Plan) -> str:
    """Return the plan as text."""
    sources = [
        [
            name,
            count(each.documents),
            count(each.tokens),
            count(each.held_out_documents),
            count(each.wanted),
            count(each.got),
            percent(each.share),
            f"{each.epochs:.3f}",
        ]
        for name, each in plan.sources.items()
    ]
    splits = [
        [name, count(each.rows), count(each.tokens), percent(each.fill), size(each.disk)]
        for name, each in plan.splits.items()
    ]
    return "\n".join(
        [
            table(["source", "documents", "tokens", "held out", "wanted", "got", "share", "epochs"], sources),
            "",
            table(["split", f"rows of {plan.length}", "tokens", "fill", "disk"], splits),
        ]
    )


def _sources(selected: Selected) -> dict[str, SourcePlan]:
    total = sum(each.got for each in selected.mixture.selections)
    return {
        each.name: SourcePlan(
            documents=found.documents,
            tokens=found.tokens,
            held_out_documents=found.held_out_documents,
            available=each.available,
            wanted=each.wanted,
            got=each.got,
            epochs=each.epochs,
            share=each.got / total,
        )
        for each, found in zip(selected.mixture.selections, selected.surveys, strict=True)
    }


def _split(config: MixConfig, windows: Iterator[Documents], itemsize: int) -> SplitPlan:
    length, overflow = config.sequence.length, config.sequence.overflow
    rows = segments = tokens = 0
    pieces = (split_documents(window.length, length, overflow, window.outline[:, 0]) for window in windows)
    for packed in pack_windows(pieces, length, config.packing.carry):
        rows += len(packed.offsets) - 1
        segments += len(packed.items.length)
        tokens += int(packed.items.length.sum(dtype=np.int64))
    disk = rows * length * itemsize + segments * _BYTES_PER_SEGMENT + rows * _BYTES_PER_ROW
    return SplitPlan(rows=rows, tokens=tokens, fill=tokens / max(1, rows * length), disk=disk)
