"""Shards: every planned row once, the same bytes however the work is cut, nothing half-done."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from small_corpus import make_corpus

from llmt_prep import arrays, shards
from llmt_prep.kernels import gather as compiled
from llmt_prep.shards import SplitTask

L, PER_SHARD = 16, 10


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SplitTask:
    """A plan of 47 rows over 4 units: 5 shards, the last of which is short."""
    random = np.random.default_rng(3)
    unit_lengths = [random.integers(1, 7, 40).tolist() for _ in range(4)]
    lengths = np.array([n for unit in unit_lengths for n in unit])
    document, offsets = random.permutation(len(lengths)), [0]
    while offsets[-1] < len(document):
        used = np.cumsum(lengths[document[offsets[-1] :]])
        offsets.append(offsets[-1] + int(np.searchsorted(used, L, "right")))
    offsets = offsets[:48]
    document = document[: offsets[-1]]
    plan = SimpleNamespace(
        num_rows=len(offsets) - 1,
        offsets=np.array(offsets),
        length=lengths[document].astype(np.uint32),
        offset=np.zeros(len(document), np.uint32),
        document=document,
        address=(np.cumsum(lengths) - lengths)[document],
    )
    monkeypatch.setattr(shards, "load_rows", lambda _: plan)
    monkeypatch.setattr(shards.corpora, "load", lambda *_: make_corpus(unit_lengths))
    return SplitTask(str(tmp_path), "train", 3, L, min(PER_SHARD, plan.num_rows), "uint16", 5, "pretrain")


def build(task: SplitTask) -> shards.Totals:
    count = shards.num_shards(shards.load_rows(task.plan_directory).num_rows, task.rows_per_shard)
    for shard in range(count):
        shards.write_shard(task, shard)
    return shards.finish_split(task)


def contents(task: SplitTask) -> dict[str, bytes]:
    files = (path for path in task.data_directory.rglob("*") if path.is_file())
    return {path.relative_to(task.data_directory).as_posix(): path.read_bytes() for path in files}


def planned_rows(task: SplitTask) -> list[list[int]]:
    """Tokens of the rows in the order of the plan: token t of the corpus is t + 1."""
    plan = shards.load_rows(task.plan_directory)
    rows = []
    for row in range(plan.num_rows):
        mine = slice(plan.offsets[row], plan.offsets[row + 1])
        pairs = zip(plan.address[mine].tolist(), plan.length[mine].tolist(), strict=True)
        tokens = [token + 1 for address, length in pairs for token in range(address, address + length)]
        rows.append(tokens + [0] * (L - len(tokens)))
    return rows


def test_every_planned_row_is_in_the_dataset_once(task: SplitTask) -> None:
    totals = build(task)
    stored = zarr.open(task.data_directory, mode="r")
    expected = planned_rows(task)
    assert stored["tokens"].shape == (len(expected), L)
    assert sorted(stored["tokens"][:].tolist()) == sorted(expected)
    assert stored["tokens"][:].tolist() != expected
    assert totals.rows == len(expected)
    assert totals.tokens == np.count_nonzero(expected) == sum(totals.tokens_of_source)


def test_the_other_arrays_describe_the_rows(task: SplitTask) -> None:
    totals = build(task)
    stored = {name: array[:] for name, array in zarr.open(task.data_directory, mode="r").arrays()}
    assert stored["row_offsets"][0] == 0
    assert stored["row_offsets"][-1] == len(stored["segment_length"]) == totals.segments
    used = np.add.reduceat(stored["segment_length"], stored["row_offsets"][:-1])
    np.testing.assert_array_equal(used, np.count_nonzero(stored["tokens"], axis=1))
    np.testing.assert_array_equal(stored["row_targets"], used - np.diff(stored["row_offsets"]))
    assert totals.targets == stored["row_targets"].sum()
    np.testing.assert_array_equal(stored["segment_document"] // 1000 % 3, stored["segment_source"])


@pytest.mark.parametrize(
    "limits", [{"BLOCK_BYTES": 1}, {"BLOCK_ROWS": 3}, {"BLOCK_SEGMENTS": 1}, {"BLOCK_SEGMENTS": 13, "BLOCK_BYTES": 130}]
)
def test_the_bytes_do_not_depend_on_blocks(
    task: SplitTask, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(task)
    reference = contents(task)
    for name, value in limits.items():
        monkeypatch.setattr(shards, name, value)
    assert len(list(shards._blocks(task, 0, shards.load_rows(task.plan_directory)))) > 1
    build(task)
    assert contents(task) == reference


def test_the_bytes_do_not_depend_on_numba(task: SplitTask, monkeypatch: pytest.MonkeyPatch) -> None:
    build(task)
    reference = contents(task)
    monkeypatch.setattr(shards, "kernels_for", lambda _: compiled)
    build(task)
    assert contents(task) == reference


def test_hashes_are_those_of_the_files(task: SplitTask) -> None:
    totals = build(task)
    chunks = {path for path in task.data_directory.rglob("*") if path.is_file() and path.name != "zarr.json"}
    assert totals.sha256 == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in chunks}


def test_rows_are_permuted_inside_their_group_only(task: SplitTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "GROUP", 2)
    build(task)
    stored, expected = zarr.open(task.data_directory, mode="r")["tokens"][:].tolist(), planned_rows(task)
    for start in range(0, len(expected), 2 * PER_SHARD):
        group = slice(start, start + 2 * PER_SHARD)
        assert sorted(stored[group]) == sorted(expected[group])


@pytest.mark.parametrize(
    ("per_shard", "shards_of_group"), [(1, 64), (65_536, 64), (65_537, 63), (1 << 22, 1), (1 << 30, 1)]
)
def test_a_group_is_whole_shards_of_at_most_four_million_rows_or_one_shard(
    per_shard: int, shards_of_group: int
) -> None:
    task = SplitTask("", "train", 1, 2, per_shard, "uint16", 0, "pretrain")
    assert task.rows_per_group == shards_of_group * per_shard


def test_a_shard_that_fails_is_not_recorded(task: SplitTask, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(arrays.ChunkWriter, "finish", fail)
        with pytest.raises(OSError, match="No space"):
            shards.write_shard(task, 0)
    assert [path for path in Path(task.staging).rglob("*") if path.is_file()] == []
    assert not shards.is_written(task, 0)
    shards.write_shard(task, 0)
    assert shards.is_written(task, 0)


def test_a_shard_whose_tokens_are_gone_is_not_done(task: SplitTask) -> None:
    shards.write_shard(task, 1)
    task.chunk(1).unlink()
    assert not shards.is_written(task, 1)
