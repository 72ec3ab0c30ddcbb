"""The statistics against plain loops over what zarr reads."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_datasets
import zarr
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep import stats
from llmt_prep.report import as_json
from llmt_prep.scan import Block
from llmt_prep.stats import dataset_stats, render, rows_with_repeats
from llmt_shared.dataset import SegmentTable, open_dataset
from llmt_shared.errors import FormatError


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_datasets.build(tmp_path_factory.mktemp("stats"))


@pytest.fixture(scope="module")
def found(built: Path) -> stats.Stats:
    return dataset_stats(open_dataset(built))


def segments(path: Path, split: str) -> list[dict[str, Any]]:
    group = zarr.open_group(path, mode="r")[split]
    offsets = group["row_offsets"][:]
    columns = {name: group[f"segment_{name}"][:].tolist() for name in ("length", "offset", "document", "source")}
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)).tolist()
    return [{"row": row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(rows)]


def quantile(lengths: list[int], q: float) -> int:
    """The smallest length that a share q does not exceed."""
    return next(each for each in sorted(lengths) if sum(other <= each for other in lengths) >= q * len(lengths))


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("source", [0, 1, 2])
def test_a_source_is_counted(built, found, split, source):
    every = segments(built, split)
    mine = [each for each in every if each["source"] == source]
    lengths = [each["length"] for each in mine]
    counted = list(found.splits[split].sources.values())[source]
    assert counted.segments == len(mine)
    assert counted.documents == sum(each["offset"] == 0 for each in mine)
    assert counted.tokens == sum(lengths)
    assert counted.share == sum(lengths) / sum(each["length"] for each in every)
    assert counted.lengths.max == max(lengths)
    for name, q in (("p5", 0.05), ("p25", 0.25), ("p50", 0.5), ("p75", 0.75), ("p95", 0.95)):
        assert getattr(counted.lengths, name) == quantile(lengths, q)
    buckets = Counter(length.bit_length() - 1 for length in lengths)
    assert counted.lengths.histogram == tuple(buckets[bucket] for bucket in range(6))  # the last one holds 32 .. 48


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_is_counted(built, found, split):
    group = zarr.open_group(built, mode="r")[split]
    counted, tokens = found.splits[split], sum(each["length"] for each in segments(built, split))
    assert counted.rows == group["tokens"].shape[0]
    assert counted.tokens == tokens
    assert counted.padding == counted.rows * small_datasets.LENGTH - tokens
    assert counted.fill == tokens / (counted.rows * small_datasets.LENGTH)
    assert counted.targets == int(group["row_targets"][:].sum())


def test_shares_are_set_against_the_mix(found):
    sources = found.splits["train"].sources
    wanted = {name: books.wanted for name, books in found.ledger.sources.items()}
    for name, source in sources.items():
        assert source.wanted_share == wanted[name] / sum(wanted.values())
        assert abs(source.share - source.wanted_share) < 0.01
        assert source.epochs == found.ledger.sources[name].epochs


def test_validation_is_not_weighted(found):
    assert {(each.wanted_share, each.epochs) for each in found.splits["validation"].sources.values()} == {(None, None)}


def test_rows_with_a_repeat_are_counted(tmp_path):
    """So small a corpus repeated so often in long rows: some rows hold a document twice."""
    path = small_datasets.build(tmp_path, sequence={"length": 1024}, budget=20_000)
    rows = defaultdict(list)
    for each in segments(path, "train"):
        rows[each["row"]].append(each)
    counted = dataset_stats(open_dataset(path)).splits["train"].rows_with_repeats
    assert counted == sum(map(has_repeat, rows.values())) > 0


def has_repeat(row: list[dict[str, Any]]) -> bool:
    seen = Counter(
        (each["document"], place) for each in row for place in range(each["offset"], each["offset"] + each["length"])
    )
    return max(seen.values(), default=0) > 1


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(1, 4)), max_size=5), max_size=6))
def test_repeats_are_rows_in_which_a_token_lies_twice(rows):
    flat = [segment for row in rows for segment in row]
    column = lambda place, dtype: np.array([segment[place] for segment in flat], dtype)  # noqa: E731
    table = SegmentTable(
        np.array([len(row) for row in rows], np.int64), column(2, np.uint32), column(1, np.uint32),
        column(0, np.uint64), np.zeros(len(flat), np.uint16),
    )  # fmt: skip
    named = [[{"document": d, "offset": o, "length": n} for d, o, n in row] for row in rows]
    wanted = [10 + row for row, content in enumerate(named) if has_repeat(content)]
    assert rows_with_repeats(Block(10, table, None, has_pairs=False)).tolist() == wanted


def test_blocks_of_one_row_give_the_same(built, found, monkeypatch):
    monkeypatch.setattr(stats, "_SEGMENTS_AT_ONCE", 1)
    assert dataset_stats(open_dataset(built)) == found


@pytest.mark.parametrize("overflow", ["truncate", "drop"])
def test_what_is_lost_comes_from_the_ledger(tmp_path, overflow):
    path = small_datasets.build(tmp_path, sequence={"length": 48, "overflow": overflow}, max_epochs=99)
    counted = dataset_stats(open_dataset(path)).splits["train"].sources
    assert any(each.truncated for each in counted.values()) is (overflow == "truncate")
    assert any(each.dropped and each.dropped_documents for each in counted.values()) is (overflow == "drop")


def test_sums_that_do_not_close_are_told(built, tmp_path):
    path = small_datasets.copy(built, tmp_path / "data")
    ledger = json.loads((path / "ledger.json").read_text())
    ledger["sources"]["web"]["records"] += 1
    (path / "ledger.json").write_text(json.dumps(ledger))
    small_datasets.reseal(path)
    counted = dataset_stats(open_dataset(path))
    assert len(counted.ledger_mistakes) == 1
    assert "these sums do not close:\nweb: records" in render(counted)


def test_a_damaged_ledger_is_a_format_error(built, tmp_path):
    path = small_datasets.copy(built, tmp_path / "data")
    (path / "ledger.json").write_text("{}")
    small_datasets.reseal(path)
    with pytest.raises(FormatError, match=r"ledger\.json: cannot be read: sources: "):
        dataset_stats(open_dataset(path))


def test_text_shows_every_source_the_histogram_and_the_closed_ledger(found):
    text = render(found)
    for name in ("web", "code", "notes", "train: ", "validation: "):
        assert name in text
    assert "█" in text
    assert text.endswith("all sums close")


def test_json_holds_everything(found):
    assert stats.Stats.model_validate_json(as_json(found)) == found


def test_nothing_held_out_is_no_split(tmp_path):
    path = small_datasets.build(tmp_path, holdout={"fraction": 0})
    assert list(dataset_stats(open_dataset(path)).splits) == ["train"]
