"""What is kept of units: enough to say of each where it is, and no more than a few bytes."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmt_prep.config import MixConfig
from llmt_prep.corpus import UNIT, Counting
from llmt_prep.documents import Unit
from llmt_prep.executor import HERE
from llmt_prep.hashes import Job, file_hashes
from llmt_prep.inputs import HashedUnits, Inputs, find_inputs
from llmt_prep.places import Places, place_units
from llmt_prep.store import COUNTED, UnitMeta
from llmt_prep.tokenization import unit_key
from llmt_prep.tokenizer import LoadedTokenizer, load_tokenizer


def places_of(mix: dict[str, Any], cache: Path, known: Path | None = None) -> Places:
    config = MixConfig.model_validate(mix)
    inputs = find_inputs(config, cache, HERE, rehash=False, remember=False)
    return place_units(config, inputs, load_tokenizer(mix["tokenizer"]), cache, known)


def with_keys(keys: list[bytes]) -> Places:
    units = np.zeros(len(keys), UNIT)
    for number, key in enumerate(keys):
        units["key"][number] = np.void(key)
    nothing: Any = None
    return Places(nothing, nothing, nothing, [], [], (Path("cache"),), units, nothing, nothing)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from([b"\0", b"a"]), st.sampled_from([b"\0", b"b"]), st.sampled_from([b"\0", b"c"])))
)
def test_the_first_of_each_key_is_found_also_where_keys_begin_or_end_alike(parts: list[tuple[bytes, ...]]) -> None:
    keys = [first * 8 + middle * 16 + last * 8 for first, middle, last in parts]
    wanted = [key not in keys[:number] for number, key in enumerate(keys)]
    assert with_keys(keys).are_first().tolist() == wanted


def test_a_place_is_where_its_key_says(mix: dict[str, Any], tmp_path: Path) -> None:
    places = places_of(mix | {"unit_size": 2000}, tmp_path / "cache")
    assert len(places) > 20
    for number, place in enumerate(places):
        assert place.directory == places.directory(number)
        assert place.directory.name == places.key(number).hex() == unit_key(place.origin.facts)
        assert place.bytes == places.size(number)
        assert places.first_unit[place.file] <= number < places.first_unit[place.file + 1]


def test_each_source_has_one_first_unit(mix: dict[str, Any], tmp_path: Path) -> None:
    places = places_of(mix | {"unit_size": 2000}, tmp_path / "cache")
    assert [place.source for place in places if place.begins_source] == [0, 1, 2]


def test_the_bytes_of_a_source_are_those_of_its_units(mix: dict[str, Any], tmp_path: Path) -> None:
    places = places_of(mix | {"unit_size": 2000}, tmp_path / "cache")
    of_source = np.bincount(places.units["source"], [place.bytes for place in places])
    assert places.bytes_of_source.tolist() == of_source.tolist()


def test_units_are_taken_to_be_in_the_known_cache_at_first(mix: dict[str, Any], tmp_path: Path) -> None:
    places = places_of(mix, tmp_path / "cache", tmp_path / "known")
    assert all(place.directory.is_relative_to(tmp_path / "known") for place in places)


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> LoadedTokenizer:
    return load_tokenizer(str(tokenizer_dir))


def test_a_unit_takes_less_than_150_bytes(mix: dict[str, Any], tmp_path: Path, tokenizer: LoadedTokenizer) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    config = MixConfig.model_validate(mix | {"sources": {"a": {"path": str(tmp_path / "a.jsonl")}}})
    (file,) = find_inputs(config, tmp_path / "cache", HERE, rehash=False, remember=False).files
    counts = dict.fromkeys(COUNTED, 1) | {"engine": "none", "dtype": "uint16", "checksums": {"tokens": "0"}}
    meta = UnitMeta(**counts)  # type: ignore[arg-type]  # of a unit that is made up

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            units = (Unit(file.path, "jsonl", number, number + 1) for number in range(count))
            hashes = file_hashes("", units, (f"{number:032x}" for number in range(count)))
            inputs = Inputs((file,), HashedUnits([Job(file, "jsonl", 1)], [hashes]), {})
            places = place_units(config, inputs, tokenizer, tmp_path / "cache")
            assert places.are_first().all()
            counting = Counting(places.units, 1)
            for number in range(count):
                counting.add(number, meta)
            assert counting.corpus(places.folders, [0], ["a"], places.first_unit).num_documents == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is done for the first time
    assert (peak(6000) - peak(1000)) / 5000 < 150
