"""Do the rows of a split keep what FORMAT.md promises: block by block, so that memory does not grow with the dataset.

Shape legend: R rows of a block, L tokens of a row, S segments of these rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep import scan
from llmt_prep.companions import InputFiles, file_of
from llmt_prep.scan import Block
from llmt_prep.verify import spans
from llmt_prep.verify.findings import Finding, finding
from llmt_prep.verify.hits import Hit, by_segment, in_rows
from llmt_prep.verify.special import Surroundings, piece_balance, special_token_hits
from llmt_shared.chunks import ArrayFolder
from llmt_shared.segments import count_targets

TOKENS_AT_ONCE = 1 << 22
"""Tokens of a block, about."""


class Expected(NamedTuple):
    """What the rows are compared with; ``None`` is not compared, for the file that says it is damaged."""

    kind: str
    length: int
    sources: tuple[str, ...]
    max_id: int
    files: InputFiles | None
    surroundings: Surroundings | None
    held_out: NDArray[np.uint64]
    """Documents of validation, sorted, while train is checked; else none."""


@dataclass
class Counted:
    """Sums over a split's rows, to be compared with the manifest and the ledger."""

    tokens_of_source: NDArray[np.int64]
    documents_of_source: NDArray[np.int64]
    """Documents that begin."""
    targets: int = 0
    documents: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    """Distinct ones, sorted; kept for validation only."""
    balance: int = 0
    """See `piece_balance`."""

    @classmethod
    def of(cls, num_sources: int) -> "Counted":
        """Return sums before the first row."""
        return cls(np.zeros(num_sources, np.int64), np.zeros(num_sources, np.int64))


def offset_findings(split: ArrayFolder, name: str, total: int) -> list[Finding]:
    """Check that offsets ascend from 0 to the number of what they count: all else is read through them."""
    array, name, before = split.open(name), f"{split.path.name}/{name}", 0
    if array[:1].tolist() != [0]:
        return [finding("F020", name, f"starts at {array[:1].tolist()}; wanted 0")]
    for start in range(0, len(array), 1 << 20):
        part = array[start : start + (1 << 20)]
        falls = np.flatnonzero(np.diff(part, prepend=before) < 0)
        if falls.size:
            return [finding("F020", name, f"falls at row {start + int(falls[0])}")]
        before = part[-1]
    if before != total:
        return [finding("F020", name, f"ends at {before}; wanted {total}, as many as there are")]
    return []


def check_rows(
    split: ArrayFolder, expected: Expected, counted: Counted, keeps_documents: bool
) -> Iterator[tuple[int, list[Hit]]]:
    """Yield, block by block, the number of rows and what is wrong in them.

    Args:
        split: arrays of the split, whose offsets are sound.
        expected: what to compare with.
        counted: sums, to which this adds.
        keeps_documents: collect the distinct documents.
    """
    tokens, row_targets = split.open("tokens"), split.open("row_targets")
    for block in scan.blocks(split, max(1, TOKENS_AT_ONCE // expected.length)):
        mine = slice(block.first_row, block.first_row + len(block.segments.per_row))
        hits = list(_segment_hits(block, expected))
        is_laid_out = not any(hit.code in ("F021", "F022") for hit in hits)
        if is_laid_out:
            hits += _token_hits(block, tokens[mine], expected)
            hits += _target_hits(block, split, expected)
        is_wrong = row_targets[mine] != _targets(block)
        hits += in_rows("F024", block.first_row, is_wrong, "row_targets is not the targets of its segments")
        counted.targets += int(row_targets[mine].sum(dtype=np.int64))
        _count(counted, block, expected, keeps_documents)
        if is_laid_out and expected.surroundings is not None:
            counted.balance += piece_balance(block, tokens[mine], expected.surroundings)
        yield len(block.segments.per_row), hits


def _segment_hits(block: Block, expected: Expected) -> Iterator[Hit]:
    """What is wrong with the segments, without their tokens."""
    segments = block.segments
    yield from by_segment("F021", block, segments.length == 0, "a segment of 0 tokens")
    real = _real(block)
    too_long = real > expected.length
    yield from in_rows("F022", block.first_row, too_long, f"segments of {real.max(initial=0)} tokens")
    unknown = segments.source >= len(expected.sources)
    yield from by_segment("F025", block, unknown, f"a source that is not one of {len(expected.sources)}")
    if expected.files is not None and not unknown.any():
        index = {name: number for number, name in enumerate(expected.sources)}
        source_of_file = np.array([index.get(name, -1) for name in expected.files.source])
        other = source_of_file[file_of(expected.files, segments.document)] != segments.source
        yield from by_segment("F025", block, other, "a document that lies in a file of another source")
        beyond = segments.document >= expected.files.num_records
        yield from by_segment("F025", block, beyond, f"a document beyond the {expected.files.num_records} records")
    if expected.held_out.size:
        shared = np.isin(segments.document, expected.held_out)
        yield from by_segment("F050", block, shared, "a document that validation holds too")


def _token_hits(block: Block, tokens_RL: NDArray[np.integer], expected: Expected) -> Iterator[Hit]:
    """What is wrong with the tokens; the segments fit their rows."""
    is_padding_RL = np.arange(expected.length) >= _real(block)[:, None]
    nonzero = (is_padding_RL & (tokens_RL != 0)).any(axis=1)
    yield from in_rows("F023", block.first_row, nonzero, "a token that is not 0 after the last segment")
    is_unknown = np.asarray((tokens_RL > expected.max_id).any(axis=1))
    too_large = f"token id {int(tokens_RL.max(initial=0))}; the tokenizer's largest is {expected.max_id}"
    yield from in_rows("F041", block.first_row, is_unknown, too_large)
    if expected.surroundings is not None and not is_unknown.any():
        yield from special_token_hits(block, tokens_RL, is_padding_RL, expected.surroundings)


def _target_hits(block: Block, split: ArrayFolder, expected: Expected) -> Iterator[Hit]:
    """What is wrong with spans and pairs; the segments fit their rows."""
    if expected.kind == "pretrain":
        return
    yield from spans.span_hits(block, expected.length)
    if expected.kind == "sft":
        yield from by_segment("F044", block, block.segments.offset > 0, "a later piece of a conversation")
        return
    yield from spans.pair_hits(block)
    said = split.open("row_chosen_targets")[block.first_row : block.first_row + len(block.segments.per_row)]
    is_wrong = said != spans.chosen_targets(block, expected.length)
    yield from in_rows("F024", block.first_row, is_wrong, "row_chosen_targets is not the targets of its chosen sides")


def _real(block: Block) -> NDArray[np.int64]:
    """[R] tokens of each row that are no padding."""
    lengths, num_rows = block.segments.length, len(block.segments.per_row)
    return np.bincount(block.row - block.first_row, lengths, num_rows).astype(np.int64)


def _targets(block: Block) -> NDArray[np.int64]:
    """[R] targets of each row, as the segments or spans give them."""
    if block.spans is not None:
        row = np.repeat(np.arange(len(block.spans.per_row)), block.spans.per_row)
        return np.bincount(row, block.spans.length, len(block.spans.per_row)).astype(np.int64)
    per_segment, num_rows = count_targets(block.segments.length), len(block.segments.per_row)
    return np.bincount(block.row - block.first_row, per_segment, num_rows).astype(np.int64)


def _count(counted: Counted, block: Block, expected: Expected, keeps_documents: bool) -> None:
    segments, num_sources = block.segments, len(expected.sources)
    known = segments.source < num_sources
    source, lengths = segments.source[known], segments.length[known]
    counted.tokens_of_source += np.bincount(source, lengths, num_sources).astype(np.int64)
    begins = source[block.begins_document[known]]
    counted.documents_of_source += np.bincount(begins, minlength=num_sources)
    if keeps_documents:
        counted.documents = np.union1d(counted.documents, segments.document)
