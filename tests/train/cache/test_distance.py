"""The distance of a file is the number of rows until the block that it belongs to, by walking the order itself."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from train.tiny_dataset import write_dataset

from llmt_shared.dataset import open_dataset
from llmt_shared.order import Blocks, block_at, endless_rows
from llmt_train.cache.distance import NEVER, Following, distances, shard_distances

followings = st.builds(
    Following,
    seed=st.integers(0, 100),
    num_rows=st.integers(1, 60),
    total_rows=st.integers(1, 150),
    rows_per_shard=st.integers(1, 9),
    shuffle_shards=st.integers(1, 5),
    place=st.integers(0, 140),
)


def walked(run: Following) -> list[float]:
    """Block after block from where the run stands: the first that holds a shard says when it is needed."""
    found = [NEVER] * run.blocks.num_shards(run.num_rows)
    place = run.place
    while place < run.total_rows and place < run.place + 2 * run.num_rows:
        epoch, inside = divmod(place, run.num_rows)
        block = block_at(run.seed, epoch, inside, run.num_rows, run.blocks)
        for shard in block.shards.tolist():
            found[shard] = min(found[shard], place - run.place)
        place += block.stop - inside
    return found


@given(followings)
def test_a_shards_distance_is_that_of_its_next_block(run):
    assert shard_distances(run).tolist() == walked(run)


@given(followings)
def test_every_row_that_comes_is_of_a_shard_whose_turn_has_come(run):
    count = min(30, run.total_rows - run.place)
    rows = endless_rows(run.seed, run.place, max(0, count), run.num_rows, run.blocks)
    of_shard = shard_distances(run)
    assert all(of_shard[row // run.rows_per_shard] <= ahead for ahead, row in enumerate(rows.tolist()))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "d", num_rows=50, rows_per_shard=4)


@given(seed=st.integers(0, 50), place=st.integers(0, 120))
def test_every_file_that_a_row_is_read_from_is_due_by_then(dataset, seed, place):
    """Also the files of segments, of which only the neighbourhood is known."""
    run = Following(seed, 50, 10_000, 4, 3, place)
    names = [path.relative_to(dataset).as_posix() for path in dataset.rglob("*") if path.is_file()]
    found = distances(names, dataset, run)
    split = open_dataset(dataset).train
    for ahead, row in enumerate(endless_rows(seed, place, 40, 50, Blocks(4, 3)).tolist()):
        first, last = split.arrays.open("row_offsets")[row : row + 2].tolist()
        used = {f"train/tokens/c/{row // 4}/0", f"train/row_targets/c/{row // 8}"}
        used |= {f"train/segment_length/c/{segment // 16}" for segment in range(first, last)}
        assert all(found[name] <= ahead for name in used)


def test_where_many_rows_have_drifted_from_the_mean_the_files_of_their_segments_are_due_too(tmp_path):
    """After n rows the number of segments is off by about sqrt(n) of them, which is more than a small shard's."""
    num_rows, per_shard = 1600, 2
    dataset = write_dataset(tmp_path / "d", num_rows=num_rows, rows_per_shard=per_shard, validation_rows=0)
    split = open_dataset(dataset).train
    offsets = split.arrays.open("row_offsets")[:]
    files = len(list((dataset / "train/segment_length/c").iterdir()))
    for shard in range(0, num_rows // per_shard, 7):
        run = Following(0, num_rows, 10**6, per_shard, 1, 0)
        place = next(
            place
            for place in range(0, num_rows, per_shard)
            if shard in block_at(0, 0, place, num_rows, run.blocks).shards
        )
        used = range(offsets[shard * per_shard] // 8, (offsets[(shard + 1) * per_shard] - 1) // 8 + 1)
        names = [f"train/segment_length/c/{number}" for number in used if number < files]
        assert set(distances(names, dataset, run._replace(place=place)).values()) == {0}


def test_what_is_no_chunk_is_always_needed_and_validation_before_the_next_block_but_one(dataset):
    run = Following(0, 50, 10_000, 4, 3, 0)
    found = distances(["ledger.json", "validation/tokens/c/0/0"], dataset, run)
    assert list(found.values()) == [0, 12]


def test_a_run_that_ends_needs_no_more_than_its_last_block():
    run = Following(seed=1, num_rows=40, total_rows=40, rows_per_shard=4, shuffle_shards=2, place=39)
    assert sorted(shard_distances(run).tolist()) == [0, 0] + [NEVER] * 8
    assert np.isinf(shard_distances(run._replace(place=40))).all()
