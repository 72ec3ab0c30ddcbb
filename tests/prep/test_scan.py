"""Blocks of rows hold the segments and spans that plain slices of the arrays hold."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from small_datasets import build, build_chats

from llmt_prep import scan
from llmt_shared.chunks import ArrayFolder
from llmt_shared.dataset import SegmentTable


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    chats = {kind: build_chats(tmp_path_factory.mktemp(kind), kind) for kind in ("sft", "preference")}
    return {"pretrain": build(tmp_path_factory.mktemp("pretrain"))} | chats


@pytest.mark.parametrize("kind", ["pretrain", "sft", "preference"])
@pytest.mark.parametrize("rows_at_once", [1, 7, 10**6])
def test_blocks_are_the_slices_of_the_arrays(datasets, kind, rows_at_once):
    stored = {name: array[:] for name, array in zarr.open_group(datasets[kind], mode="r")["train"].arrays()}
    num_rows, seen = len(stored["row_targets"]), 0
    for block in scan.blocks(ArrayFolder(datasets[kind] / "train"), rows_at_once):
        first, last = block.first_row, min(block.first_row + rows_at_once, num_rows)
        assert first == seen
        borders = stored["row_offsets"][first : last + 1]
        assert block.segments.per_row.tolist() == np.diff(borders).tolist()
        for name in SegmentTable._fields[1:]:
            wanted = stored[f"segment_{name}"][borders[0] : borders[-1]]
            assert getattr(block.segments, name).tolist() == wanted.tolist()
        assert block.row.tolist() == np.repeat(np.arange(first, last), np.diff(borders)).tolist()
        check_spans(block, stored, first, last)
        seen = last
    assert seen == num_rows


def check_spans(block: scan.Block, stored: dict[str, np.ndarray], first: int, last: int) -> None:
    if "span_offsets" not in stored:
        assert block.spans is None
        return
    assert block.spans is not None
    borders = stored["span_offsets"][first : last + 1]
    assert block.spans.per_row.tolist() == np.diff(borders).tolist()
    for name in ("start", "length"):
        wanted = stored[f"span_{name}"][borders[0] : borders[-1]]
        assert getattr(block.spans, name).tolist() == wanted.tolist()
