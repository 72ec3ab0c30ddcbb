"""Which units a simulation looks at."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from made_up_samples import mix

from llmt_prep import documents
from llmt_prep.config import MixConfig
from llmt_prep.inputs import list_files
from llmt_prep.simulation.sample import FEWEST, draw_units, extents

UNIT = 1000


def config_of(folder: Path, **changes: object) -> MixConfig:
    sources = {path.name: {"path": str(path)} for path in sorted(folder.iterdir())}
    return mix(sources, unit_size=UNIT, output=str(folder.parent / "out"), **changes)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Two sources of JSON lines: one of 60 units in 3 files, one of 5 in one file; and one of 7 compressed files."""
    folder = tmp_path / "raw"
    for source, sizes in {"web": [20_000, 30_000, 10_000], "code": [5000]}.items():
        (folder / source).mkdir(parents=True)
        for number, size in enumerate(sizes):
            (folder / source / f"{number}.jsonl").write_bytes((b'{"text": "' + b"x" * 87 + b'"}\n') * (size // 100))
    (folder / "zipped").mkdir()
    for number in range(7):
        (folder / "zipped" / f"{number}.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 10))
    return folder


def drawn(config: MixConfig, wanted: int) -> dict[int, list[tuple[int, int]]]:
    """By source, file and start of each unit."""
    files, _ = list_files(config, Path("cache"))
    found: dict[int, list[tuple[int, int]]] = {source: [] for source in range(len(config.sources))}
    for each in draw_units(config, files, wanted):
        found[files[each.file].source].append((each.file, each.unit.start))
    return found


def test_the_extent_of_a_source_is_known_without_opening_it(sources: Path) -> None:
    config = config_of(sources)
    files, _ = list_files(config, Path("cache"))
    code, web, zipped = extents(config, files)
    assert (web.files, web.bytes, web.largest_file, web.units) == (3, 60_000, 30_000, 60)
    assert (code.files, code.units) == (1, 5)
    assert (zipped.files, zipped.units) == (7, 7)


def test_units_are_whole_units_of_the_run(sources: Path) -> None:
    config = config_of(sources)
    files, _ = list_files(config, Path("cache"))
    for each in draw_units(config, files, 10_000):
        path = Path(files[each.file].path)
        assert each.unit in documents.split_into_units(path, "jsonl", UNIT)


def test_about_the_wanted_bytes_are_drawn_of_each_source_and_everything_of_a_small_one(sources: Path) -> None:
    code, web, zipped = drawn(config_of(sources), 10_000).values()
    assert len(web) == 10
    assert len(code) == 5
    assert len(zipped) == 7


def test_they_are_spread_over_the_source(sources: Path) -> None:
    web = drawn(config_of(sources), 6000)[1]
    borders = np.cumsum([0, 20_000, 30_000, 10_000])
    first = min(file for file, _ in web)
    places = [int(borders[file - first]) + start for file, start in web]
    assert len(places) == 6
    assert np.all(np.diff(places) == 10_000)


def test_few_bytes_still_give_some_units(sources: Path) -> None:
    assert len(drawn(config_of(sources), 1)[1]) == FEWEST


def test_the_seed_decides(sources: Path) -> None:
    one, again, other = (drawn(config_of(sources, seed=seed), 6000) for seed in (1, 1, 5))
    assert one == again != other


def test_every_unit_is_drawn_equally_often(sources: Path) -> None:
    """Over many seeds: else documents of large files would count for more."""
    counts: dict[tuple[int, int], int] = {}
    for seed in range(300):
        for place in drawn(config_of(sources, seed=seed), 6000)[1]:
            counts[place] = counts.get(place, 0) + 1
    assert len(counts) == 60
    assert 10 < min(counts.values()) <= max(counts.values()) < 60  # 30 each; six standard errors
