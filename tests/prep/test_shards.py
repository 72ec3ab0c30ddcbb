"""Shards: every planned row once, the same bytes however the work is cut, nothing half-done."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr
from small_corpus import make_corpus
from synthetic_chats import Chat, documents_of, landed, random_chats, write_chats

from llmt_prep import arrays, shards
from llmt_prep import corpus as corpora
from llmt_prep.executor import local
from llmt_prep.kernels import gather as compiled
from llmt_prep.rows import write_rows
from llmt_prep.shards import SplitTask
from llmt_prep.windows import in_windows
from llmt_shared.chunks import ArrayFolder
from llmt_shared.dataset import Split
from llmt_shared.errors import DataError
from llmt_shared.segments import IGNORE

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
    staged(tmp_path, "this")
    return SplitTask(str(tmp_path), "train", 3, L, min(PER_SHARD, plan.num_rows), "uint16", 5, "pretrain", "this")


def staged(folder: Path, recipe: str) -> None:
    """Make a folder the staging directory of a recipe."""
    (folder / "recipe.json").write_text(json.dumps({"recipe": recipe}))


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
    task = SplitTask("", "train", 1, 2, per_shard, "uint16", 0, "pretrain", "this")
    assert task.rows_per_group == shards_of_group * per_shard


def test_a_shard_that_fails_is_not_recorded(task: SplitTask, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(arrays.ChunkWriter, "finish", fail)
        with pytest.raises(OSError, match="No space"):
            shards.write_shard(task, 0)
    assert [path.name for path in Path(task.staging).rglob("*") if path.is_file()] == ["recipe.json"]
    assert not shards.is_written(task, 0)
    shards.write_shard(task, 0)
    assert shards.is_written(task, 0)


def test_a_task_of_another_recipe_writes_nothing(task: SplitTask) -> None:
    staged(Path(task.staging), "another")
    with pytest.raises(DataError, match="is not of this run any more"):
        shards.write_shard(task, 0)
    assert [path.name for path in Path(task.staging).rglob("*") if path.is_file()] == ["recipe.json"]


def test_a_task_whose_staging_directory_is_gone_does_not_make_it_again(task: SplitTask, tmp_path: Path) -> None:
    gone = replace(task, staging=str(tmp_path / "published"))
    with pytest.raises(DataError, match="is not of this run any more"):
        shards.write_shard(gone, 0)
    assert not Path(gone.staging).exists()


def test_a_shard_whose_temporary_file_was_removed_never_appears(
    task: SplitTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does a task that was taken for lost and goes on when another run has cleaned up."""

    def cleaned_up(self: arrays.ChunkWriter, finish: Callable[..., None] = arrays.ChunkWriter.finish) -> None:
        finish(self)
        for leftover in Path(task.staging).rglob("*.tmp"):
            leftover.unlink()

    monkeypatch.setattr(arrays.ChunkWriter, "finish", cleaned_up)
    with pytest.raises(FileNotFoundError):
        shards.write_shard(task, 0)
    assert not task.chunk(0).exists()
    assert not task.sidecar(0).exists()


def test_a_shard_whose_tokens_are_gone_is_not_done(task: SplitTask) -> None:
    shards.write_shard(task, 1)
    task.chunk(1).unlink()
    assert not shards.is_written(task, 1)


KINDS = pytest.mark.parametrize("kind", ["sft", "preference"])
OVERFLOW = {"sft": "truncate", "preference": "truncate_prompt"}
LONG = 32
"""Tokens of a row of chats; some chats are longer, and of these some keep no target."""


def chats_of(kind: str) -> list[list[Chat]]:
    """Two sources."""
    both = random_chats(200, 2 if kind == "preference" else 1, 36 if kind == "preference" else 80, seed=4)
    return [both[:150], both[150:]]


def chat_task(folder: Path, kind: str, unit_documents: Sequence[int] = (40,)) -> SplitTask:
    """A plan of chats or pairs, two epochs of them, that is gathered as the pipeline does it."""
    corpus = write_chats(folder / "store", chats_of(kind), unit_documents)
    corpora.save(corpus, corpora.saved_in(folder))
    task = SplitTask(str(folder), "train", 2, LONG, PER_SHARD, "uint16", 5, kind, "this")  # type: ignore[arg-type]
    staged(folder, "this")
    windows = in_windows([documents_of(corpus)] * 2, 64)
    write_rows(task.plan_directory, windows, corpus, LONG, OVERFLOW[kind], 0.9)
    return task


def stored_arrays(task: SplitTask) -> dict[str, np.ndarray]:
    return {name: array[:] for name, array in zarr.open(task.data_directory, mode="r").arrays()}


def planned_segments(kind: str) -> dict[tuple[int, int], tuple[list[int], list[bool]]]:
    """Tokens, and which are targets, of all that lands, by provenance number and offset."""
    return {
        (1000 * source + 2 * number, part.offset): (part.side.tokens, part.side.is_target)
        for source, chats in enumerate(chats_of(kind))
        for number, chat in enumerate(chats)
        for part in landed(chat, LONG, OVERFLOW[kind])
    }


def segments_of_rows(stored: dict[str, np.ndarray]) -> list[list[tuple[int, int]]]:
    """Provenance number and offset of the segments of each row."""
    keys = list(zip(stored["segment_document"].tolist(), stored["segment_offset"].tolist(), strict=True))
    return [keys[first:last] for first, last in pairwise(stored["row_offsets"].tolist())]


def expected_rows(kind: str, stored: dict[str, np.ndarray]) -> list[tuple[list[int], list[bool]]]:
    """Tokens of each row, and which are targets, put together from the chats."""
    parts, rows = planned_segments(kind), []
    for keys in segments_of_rows(stored):
        tokens = [token for key in keys for token in parts[key][0]]
        is_target = [flag for key in keys for flag in parts[key][1]]
        padding = LONG - len(tokens)
        rows.append((tokens + [0] * padding, is_target + [False] * padding))
    return rows


@KINDS
def test_every_chat_that_lands_is_in_the_dataset_once_an_epoch(tmp_path: Path, kind: str) -> None:
    task = chat_task(tmp_path, kind)
    totals = build(task)
    stored = stored_arrays(task)
    assert shards.num_shards(totals.rows, PER_SHARD) > 3
    assert sorted(key for row in segments_of_rows(stored) for key in row) == sorted([*planned_segments(kind)] * 2)
    np.testing.assert_array_equal(stored["segment_source"], stored["segment_document"] // 1000)
    sizes = (len(stored["segment_length"]), len(stored["span_start"]), len(stored.get("pair_segments", ())))
    assert (totals.segments, totals.spans, totals.pairs) == sizes


@KINDS
def test_tokens_and_targets_are_those_of_the_chats(tmp_path: Path, kind: str) -> None:
    task = chat_task(tmp_path, kind)
    totals = build(task)
    stored = stored_arrays(task)
    held = np.zeros(stored["tokens"].shape, int)
    row = np.repeat(np.arange(len(held)), np.diff(stored["span_offsets"]))
    for number, start, length in zip(row, stored["span_start"], stored["span_length"], strict=True):
        held[number, start : start + length] += 1
    wanted = expected_rows(kind, stored)
    assert stored["tokens"].tolist() == [tokens for tokens, _ in wanted]
    assert held.tolist() == [is_target for _, is_target in wanted]
    assert stored["row_targets"].tolist() == [sum(is_target) for _, is_target in wanted]
    assert totals.targets == held.sum()


@KINDS
def test_the_reader_gives_the_labels_of_the_chats(tmp_path: Path, kind: str) -> None:
    task = chat_task(tmp_path, kind)
    build(task)
    split = Split(task.data_directory, ArrayFolder(task.data_directory), has_spans=True, has_pairs=kind == "preference")
    for number, (tokens, is_target) in enumerate(expected_rows(kind, stored_arrays(task))):
        row = split[number]
        following = zip([*tokens[1:], 0], [*is_target[1:], False], strict=True)
        assert row.tokens.tolist() == tokens
        assert row.labels.tolist() == [token if flag else IGNORE for token, flag in following]


@KINDS
@pytest.mark.parametrize("num_rows", [0, 1, 30])
def test_the_reader_gives_the_spans_and_pairs_of_rows_in_any_order(tmp_path: Path, kind: str, num_rows: int) -> None:
    task = chat_task(tmp_path, kind)
    build(task)
    stored = stored_arrays(task)
    split = Split(task.data_directory, ArrayFolder(task.data_directory), has_spans=True, has_pairs=kind == "preference")
    rows = np.random.default_rng(num_rows).integers(0, split.num_rows, num_rows)  # with repeats
    spans, pairs, wanted = split.spans(rows), split.pairs(rows), expected_rows(kind, stored)
    assert spans is not None
    held = [token for start, n in zip(spans.start, spans.length, strict=True) for token in range(start, start + n)]
    flat = [flag for row in rows for flag in wanted[row][1]]
    assert held == [token for token, is_target in enumerate(flat) if is_target]
    if pairs is None:
        assert kind == "sft"
        return
    segments = split.segments(rows)
    assert pairs.segments.ravel().tolist() == list(range(len(segments.length)))
    assert (2 * pairs.per_row).tolist() == segments.per_row.tolist()
    assert pairs.chosen_targets.tolist() == stored["row_chosen_targets"][rows].tolist()


def test_each_pair_is_two_neighbours_of_a_row_and_its_chosen_targets_are_counted(tmp_path: Path) -> None:
    task = chat_task(tmp_path, "preference")
    build(task)
    stored, parts = stored_arrays(task), planned_segments("preference")
    keys, pairs = segments_of_rows(stored), stored["pair_segments"]
    assert pairs.dtype == np.uint64
    assert pairs.ravel().tolist() == list(range(len(stored["segment_length"])))
    assert (2 * stored["pair_offsets"]).tolist() == stored["row_offsets"].tolist()
    for number, row in enumerate(keys):
        for (one, chosen), (other, rejected) in zip(row[::2], row[1::2], strict=True):
            assert one == other
            assert chosen < rejected
        assert stored["row_chosen_targets"][number] == sum(sum(parts[key][1]) for key in row[::2])


@KINDS
@pytest.mark.parametrize("limits", [{"BLOCK_BYTES": 1}, {"BLOCK_ROWS": 3}, {"BLOCK_SEGMENTS": 13, "BLOCK_BYTES": 260}])
def test_the_bytes_of_chats_do_not_depend_on_blocks_and_units(
    tmp_path: Path, kind: str, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, other = chat_task(tmp_path / "one", kind), chat_task(tmp_path / "other", kind, [7, 1, 33])
    build(task)
    for name, value in limits.items():
        monkeypatch.setattr(shards, name, value)
    build(other)
    assert contents(other) == contents(task)


@KINDS
def test_the_bytes_of_chats_do_not_depend_on_workers(tmp_path: Path, kind: str) -> None:
    task, other = chat_task(tmp_path / "one", kind), chat_task(tmp_path / "other", kind)
    totals = build(task)
    numbers = range(shards.num_shards(totals.rows, PER_SHARD))
    assert len(list(local(2).run(shards.write_shard, ((other, number) for number in numbers)))) == len(numbers)
    shards.finish_split(other)
    assert contents(other) == contents(task)


@KINDS
def test_a_shard_of_chats_that_fails_half_way_is_made_again(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = chat_task(tmp_path, kind)
    build(task)
    reference = contents(task)
    task.sidecar(1).unlink()
    monkeypatch.setattr(shards, "BLOCK_ROWS", 3)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_block", _failing_at_the_third(shards._write_block))
        with pytest.raises(OSError, match="No space"):
            shards.write_shard(task, 1)
    assert not shards.is_written(task, 1)
    shards.write_shard(task, 1)
    shards.finish_split(task)
    assert contents(task) == reference


def _failing_at_the_third(write: Callable[..., Any]) -> Callable[..., Any]:
    number = count(1)

    def failing(*arguments: Any) -> Any:
        if next(number) == 3:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    return failing


@KINDS
def test_some_of_these_chats_are_cut_and_some_dropped(kind: str) -> None:
    chats = [chat for source in chats_of(kind) for chat in source]
    whole = [sum(len(side.tokens) for side in chat) for chat in chats]
    kept = [sum(len(part.side.tokens) for part in landed(chat, LONG, OVERFLOW[kind])) for chat in chats]
    assert 0 in kept
    assert any(0 < tokens < length for tokens, length in zip(kept, whole, strict=True))
