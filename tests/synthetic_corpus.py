"""Corpora that are only lengths and hashes: as arrays, and as units of the token store."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmt_prep.config import SequenceConfig
from llmt_prep.corpus import Corpus, read_corpus
from llmt_prep.mixture import Source
from llmt_prep.order import Documents, Shuffling, in_order
from llmt_prep.packing import landing
from llmt_prep.store import UnitMeta, unit_folder
from llmt_prep.survey import LIGHTEST, survey

SHUFFLING = Shuffling(seed=42)
SMALL_BLOCKS = Shuffling(seed=42, block_tokens=4 * LIGHTEST, group_tokens=16 * LIGHTEST)
"""Blocks of 4 short documents, groups of 4 blocks."""
LONG_ROWS = SequenceConfig(length=2**31 - 1)


@dataclass
class Arrays:
    """Columns of a corpus in memory, which count what is read of them."""

    all_lengths: NDArray[np.int64]
    hashes: NDArray[np.uint64] | None = None
    read: int = 0

    def lengths(self, first: int, last: int) -> NDArray[np.int64]:
        self.read += last - first
        return self.all_lengths[first:last]

    def text_hashes(self, first: int, last: int) -> NDArray[np.uint64]:
        assert self.hashes is not None, "no hash was to be read"
        return self.hashes[first:last]

    def outlines(self, first: int, last: int) -> NDArray[np.uint32]:
        return no_outline(last - first)


def of_lengths(lengths: NDArray[Any], document: NDArray[Any] | None = None) -> Documents:
    """Documents whose every token is a target; if not said, the first of a corpus, in order."""
    addresses = np.cumsum(lengths) - lengths
    numbers = np.arange(len(lengths)) if document is None else document
    return Documents(numbers, lengths, addresses, no_outline(len(lengths)))


def no_outline(count: int) -> NDArray[np.uint32]:
    """Of documents whose every token is a target."""
    return np.broadcast_to(np.uint32(0), (count, 2))


def hashes(count: int, seed: int = 0) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


def sources_of(
    parts: dict[str, tuple[Sequence[int], dict[str, Any]]],
    shuffling: Shuffling = SHUFFLING,
    sequence: SequenceConfig = LONG_ROWS,
    fraction: float = 0.0,
) -> tuple[Arrays, list[Source]]:
    """A corpus of several sources: the lengths and the amount of each, by name."""
    lengths = [np.array(of_source, np.int64) for of_source, _ in parts.values()]
    borders = np.cumsum([0, *map(len, lengths)])
    corpus = Arrays(np.concatenate(lengths), hashes(int(borders[-1])))
    surveys = survey(corpus, borders, sequence, fraction, shuffling.block_tokens)
    corpus.read = 0

    def lands(documents: Documents) -> NDArray[np.int64]:
        return landing(documents.length, sequence.length, sequence.overflow)

    return corpus, [
        Source(
            name,
            found.trainable_documents,
            found.available,
            partial(in_order, corpus, found.blocks, fraction, name, shuffling),
            lands,
            **amount,
        )
        for (name, (_, amount)), found in zip(parts.items(), surveys, strict=True)
    ]


def write_corpus(folder: Path, sources: Sequence[Sequence[int]], unit_documents: Sequence[int] | int) -> Corpus:
    """Write units of the token store, given the lengths of each source; the n-th document's text hash is n of `hashes`.

    Args:
        folder: where the units go.
        sources: lengths of each source's documents.
        unit_documents: documents of every unit, or of one after another, over and over; a source's last has the rest.
    """
    text_hashes = hashes(sum(map(len, sources)))
    units: list[tuple[int, str]] = []
    done = 0
    for source, lengths in enumerate(sources):
        start = 0
        while start < len(lengths) or not any(of_unit == source for of_unit, _ in units):
            sizes = [unit_documents] if isinstance(unit_documents, int) else unit_documents
            size = sizes[len(units) % len(sizes)]
            part = np.array(lengths[start : start + size], np.int64)
            write_unit(unit_folder(folder, key_of(len(units))), part, text_hashes[done : done + len(part)])
            units.append((source, key_of(len(units))))
            start, done = start + len(part), done + len(part)
    return read_corpus(folder, [(source, f"file-{source}") for source in range(len(sources))], units)


def key_of(unit: int) -> str:
    """The key of a unit that is made up."""
    return f"{unit:064x}"


META = (0, 0, "synthetic", "uint16", {})
"""What ends a synthetic unit's UnitMeta: documents compared, fall-backs, engine, dtype, checksums."""


def write_unit(unit: Path, lengths: NDArray[Any], text_hashes: NDArray[np.uint64]) -> None:
    """Write one unit, whose tokens are a hole in a file."""
    documents, tokens = len(lengths), int(lengths.sum(dtype=np.int64))
    unit.mkdir(parents=True)
    lengths.astype("<u4").tofile(unit / "lengths")
    np.arange(documents, dtype="<u4").tofile(unit / "records")
    text_hashes.astype("<u8").tofile(unit / "text_hash")
    (unit / "quarantine.jsonl").touch()
    with (unit / "tokens").open("wb") as file:
        file.truncate(2 * tokens)
    meta = UnitMeta(documents, documents, 0, 0, 0, tokens, 4 * tokens, documents, *META)
    (unit / "meta.json").write_text(json.dumps(asdict(meta)))
