"""Which part of a corpus a simulation looks at: whole units, spread evenly over every source.

Units are drawn with equal probability, so that documents for each byte, and tokens for each document, come out
unbiased also where files, and with them units, have very different sizes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmt_prep import documents
from llmt_prep.config import MixConfig
from llmt_prep.inputs import InputFile, InputUnit, reading_of, span_of

FEWEST, MOST = 3, 256
"""Units of a source, where it has so many; a unit costs files and their fsync, however small it is."""


class Extent(NamedTuple):
    """How much there is of one source, from the names and sizes of its files alone."""

    files: int
    bytes: int
    largest_file: int
    """Bytes."""
    units: int
    """Exact where files are cut by bytes, else about."""


def extents(config: MixConfig, files: Sequence[InputFile]) -> list[Extent]:
    """Return how much there is of each source; no file is opened."""
    found = []
    for source in range(len(config.sources)):
        mine = [file for file in files if file.source == source]
        sizes = [file.bytes for file in mine]
        units = sum(_about_units(config, file) for file in mine)
        found.append(Extent(len(mine), sum(sizes), max(sizes), units))
    return found


def draw_units(config: MixConfig, files: Sequence[InputFile], wanted: int) -> list[InputUnit]:
    """Return units of every source, in the order of the corpus, without the hash of their content.

    Args:
        config: the mix; its seed decides which units.
        files: of all sources.
        wanted: bytes of a source, about.
    """
    drawn: set[tuple[int, int]] = set()
    for source in range(len(config.sources)):
        mine = [number for number, file in enumerate(files) if file.source == source]
        units = np.array([_about_units(config, files[number]) for number in mine], np.int64)
        size = sum(files[number].bytes for number in mine)
        for file, unit in _spread(units, size, wanted, np.random.default_rng([config.seed, source])):
            drawn.add((mine[file], unit))
    return list(_opened(config, files, sorted(drawn)))


def _about_units(config: MixConfig, file: InputFile) -> int:
    """Units of a file, before anybody has looked inside."""
    reader = _reader(config, file)
    if reader == "text" or (reader == "jsonl" and documents.compression(file.path)):
        return 1
    return max(1, -(-file.bytes // config.unit_size))


def _reader(config: MixConfig, file: InputFile) -> str:
    return documents.reader_for(file.path, reading_of(config, list(config.sources.values())[file.source]).reader)


def _spread(
    units: NDArray[np.int64], size: int, wanted: int, generator: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Every k-th unit of a source, from a random one on: (file, number in the file).

    Args:
        units: of each file.
        size: bytes of all files together.
        wanted: bytes to draw, about.
        generator: decides where to begin.
    """
    total = int(units.sum())
    count = min(total, MOST, max(FEWEST, -(-wanted * total // max(size, 1))))
    places = ((np.arange(count) + generator.random()) * total / count).astype(np.int64)
    ends = np.cumsum(units)
    for place in places.tolist():
        file = int(np.searchsorted(ends, place, "right"))
        yield file, place - int(ends[file] - units[file])


def _opened(config: MixConfig, files: Sequence[InputFile], drawn: Sequence[tuple[int, int]]) -> Iterator[InputUnit]:
    """The units, each once: a file of columns may have fewer than its size lets one think."""
    done: set[tuple[int, int]] = set()
    for number, place in drawn:
        file = files[number]
        units = documents.split_into_units(file.path, _reader(config, file), config.unit_size)
        index = place * len(units) // _about_units(config, file)
        if units and (number, index) not in done:
            done.add((number, index))
            yield InputUnit(number, units[index], "", span_of(units[index], file.bytes, index, len(units)))
