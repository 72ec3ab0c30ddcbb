"""Which rows and documents a bad step is to blame on: their names, and the command that shows them.

The rows of a step are a function of the run, so they are read again when something is wrong, and only then.
"""

import math
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_shared.terminal import escaped
from llmt_train.data.batch import PackedBatch
from llmt_train.data.stream import count, read_batch, rows_of_step
from llmt_train.module import StepPart
from llmt_train.setup import Setup
from llmt_train.watch.provenance import Place, find_places
from llmt_train.watch.spikes import Usual

_MOST_NAMED = 8
_WORST = 3
_NOTEWORTHY = 0.1
"""Share of a spike's rise from which on a piece is named beside the worst."""


class Piece(NamedTuple):
    """A segment of a step."""

    row: int
    source: int
    document: int
    loss: float
    """What it added to the step's loss; not finite where it is to blame for that."""
    weight: float
    """Its share of what the loss is a mean over: of all targets, or of all pairs."""
    is_in_bad_part: bool
    """Whether it is of a micro-batch whose loss is not finite."""


def describe_spike(setup: Setup, step: int, loss: float, usual: Usual, parts: list[StepPart]) -> dict[str, Any]:
    """Return what metrics.jsonl says of a spike: what was usual, and the pieces that raised the loss most.

    Args:
        setup: the run.
        step: the one whose loss it is, from 1.
        loss: of the step.
        usual: what the losses before say.
        parts: of the step's micro-batches.

    Returns:
        ``usual``, ``limit``, ``pieces``. Of each piece: its row, its document as ``source:number``, with file and
        record where they are known; its share of the step's loss; its own loss, per target or pair. The worst are
        those that lie above the usual by most, targets counted: a long text of the usual loss is not bad, and a
        short one cannot raise much.
    """
    pieces = [piece for piece in _pieces(setup, step - 1, parts) if piece.weight > 0]
    rises = sorted(((piece.loss - usual.loss * piece.weight, piece) for piece in pieces), reverse=True)[:_WORST]
    enough = min(rises[0][0], _NOTEWORTHY * (loss - usual.loss))
    worst = [piece for rise, piece in rises if rise >= enough]
    places = find_places(setup.dataset.folder, [piece.document for piece in worst])
    described = [_describe(setup, piece, place, loss) for piece, place in zip(worst, places, strict=True)]
    return {"usual": usual.loss, "limit": usual.limit, "pieces": described}


def _describe(setup: Setup, piece: Piece, place: Place | None, loss: float) -> dict[str, Any]:
    return {
        "row": piece.row,
        "document": f"{setup.dataset.sources[piece.source]}:{piece.document}",
        **(place._asdict() if place is not None else {}),
        "share": round(piece.loss / loss, 4),
        "loss": round(piece.loss / piece.weight, 4),
    }


def spike_message(setup: Setup, line: dict[str, Any]) -> str:
    """Return what a person is told of a step's line with a ``spike``."""
    spike = line["spike"]
    pieces = "; ".join(
        f"row {piece['row']}, {_named(piece['document'], piece.get('file'), piece.get('record'))}: loss "
        f"{piece['loss']:.4f}, {piece['share']:.0%} of the step's"
        for piece in spike["pieces"]
    )
    return (
        f"warning: step {line['step']}: the loss is {line['loss']:.4f}, where {spike['usual']:.4f} was usual and "
        f"{spike['limit']:.4f} is the limit; it comes most from {pieces}.{_look(setup, spike['pieces'][0]['row'])}"
    )


def not_finite_message(setup: Setup, step: int, norm: float, parts: list[StepPart]) -> str:
    """Name the rows and documents of a step: those that are to blame, where that is known.

    Args:
        setup: the run.
        step: the one whose loss or gradient is not finite, from 1.
        norm: of the gradient.
        parts: of the step's micro-batches.
    """
    loss = sum(part.measures["loss"].item() for part in parts)
    what = f"the loss is {loss:.4f}" + (f", but the norm of its gradient {norm}" if math.isfinite(loss) else "")
    blamed = _to_blame(list(_pieces(setup, step - 1, parts)))
    rows = list(dict.fromkeys(piece.row for piece in blamed))
    documents = list(dict.fromkeys((piece.source, piece.document) for piece in blamed))
    shown = documents[:_MOST_NAMED]
    places = find_places(setup.dataset.folder, [document for _, document in shown])
    names = [
        _named(f"{setup.dataset.sources[source]}:{document}", *(place or (None, None)))
        for (source, document), place in zip(shown, places, strict=True)
    ]
    return (
        f"step {step}: {what}; stopped before it reached the weights. Rows {_shorten(rows, len(rows))}; documents "
        f"{_shorten(names, len(documents))}.{_look(setup, rows[0])} "
        "A lower optim.lr or a longer optim.warmup mends most such runs"
    )


def _to_blame(pieces: list[Piece]) -> list[Piece]:
    """Those whose loss is not finite; else all of the micro-batches whose loss is not; else all."""
    bad = [piece for piece in pieces if not math.isfinite(piece.loss)]
    return bad or [piece for piece in pieces if piece.is_in_bad_part] or pieces


def _pieces(setup: Setup, step: int, parts: list[StepPart]) -> Iterator[Piece]:
    """The segments of a step, counted from 0, in the order of its micro-batches."""
    plan, split, pairing = setup.plan, setup.dataset.train, setup.pairing["train"]
    rows = rows_of_step(plan, step)
    denominators = count(split, rows)
    for micro, part in enumerate(parts):
        own = rows[micro * plan.micro_rows : (micro + 1) * plan.micro_rows]
        if not len(own):
            continue  # padding alone
        batch, table = read_batch(split, own, denominators, pairing), split.segments(own)
        is_segment = (batch.segment_source >= 0).numpy()
        row_of_segment = np.repeat(own, table.per_row)
        losses, weights = part.by_piece.cpu().numpy()[is_segment], _weights(batch)[is_segment]
        is_bad = not math.isfinite(part.measures["loss"].item())
        columns = (row_of_segment, table.source, table.document, losses, weights)
        for row, source, document, loss, weight in zip(*(column.tolist() for column in columns), strict=True):
            yield Piece(row, source, document, loss, weight, is_bad)


def _weights(batch: PackedBatch) -> NDArray[np.float64]:
    """[P] share of each piece in what the loss is a mean over; a pair is counted on its chosen side, as its loss is."""
    number = len(batch.lengths)
    if batch.pairs is not None:
        return np.bincount(batch.pairs[:, 0].numpy(), minlength=number) / batch.denominators["pairs"]
    piece_of_label = batch.segment_ids_flat[batch.label_places].numpy()
    return np.bincount(piece_of_label, minlength=number) / batch.denominators["targets"]


def _named(document: str, file: str | None, record: int | None) -> str:
    """A document as people look for it; a name may hold whatever a file's name may hold."""
    return escaped(document if file is None else f"{document} ({file} record {record})")


def _look(setup: Setup, row: int) -> str:
    """The command that shows a row, as a sentence of its own; nothing for synthetic rows, which are nowhere."""
    if setup.dataset.tokenizer_dir is None:
        return ""
    command = shlex.join(["llmt-prep", "inspect", str(setup.dataset.path), "--row", str(row)])
    return f" `{command}` shows it."


def _shorten(items: list[Any], number: int) -> str:
    more = f" and {number - _MOST_NAMED} more" if number > _MOST_NAMED else ""
    return ", ".join(str(item) for item in items[:_MOST_NAMED]) + more
