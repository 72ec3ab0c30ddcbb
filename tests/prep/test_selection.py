"""Which documents reach which split: a function of mix and texts, not of how the store was cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_corpus import hashes, write_corpus

from llmt_prep import order
from llmt_prep import survey as surveys
from llmt_prep.config import MixConfig
from llmt_prep.corpus import Corpus
from llmt_prep.holdout import held_out
from llmt_prep.order import Documents
from llmt_prep.plan import describe
from llmt_prep.rows import load_rows, write_rows
from llmt_prep.selection import select, windows_of_splits
from llmt_shared.errors import ConfigError, DataError

LENGTHS = [np.random.default_rng(3).integers(1, 900, 200).tolist(), list(range(1, 60))]


def config_of(**changes: Any) -> MixConfig:
    mix = {
        "output": "out", "tokenizer": "none", "sequence": {"length": 256}, "holdout": {"fraction": 0.2},
        "packing": {"window": 40}, "sources": {"a": {"path": "a", "epochs": 1.6}, "b": {"path": "b"}},
    }  # fmt: skip
    return MixConfig.model_validate(mix | changes)


def splits_of(config: MixConfig, corpus: Corpus) -> dict[str, Documents]:
    return {
        name: Documents(*(np.concatenate(columns) for columns in zip(*windows, strict=True)))
        for name, windows in windows_of_splits(config, corpus, select(config, corpus)).items()
    }


def test_a_document_is_in_one_split_and_validation_has_each_once(tmp_path: Path) -> None:
    config = config_of()
    splits = splits_of(config, write_corpus(tmp_path, LENGTHS, 30))
    held = held_out(hashes(259), 0.2)
    assert splits["validation"].document.tolist() == np.flatnonzero(held).tolist()
    assert sorted(set(splits["train"].document.tolist())) == np.flatnonzero(~held).tolist()


def test_without_a_held_out_document_there_is_no_validation(tmp_path: Path) -> None:
    assert list(splits_of(config_of(holdout={"fraction": 0}), write_corpus(tmp_path, LENGTHS, 30))) == ["train"]


def test_the_plan_does_not_depend_on_units_or_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for number, (unit_documents, piece) in enumerate([(1000, 1000), (7, 1000), (30, 11)]):
        monkeypatch.setattr(order, "PIECE", piece)
        monkeypatch.setattr(surveys, "PIECE", piece)
        corpus, config = write_corpus(tmp_path / f"store-{number}", LENGTHS, unit_documents), config_of()
        for split, windows in windows_of_splits(config, corpus, select(config, corpus)).items():
            write_rows(tmp_path / f"{number}-{split}", windows, corpus, 256, "split", 0.98)
        files = sorted(tmp_path.glob(f"{number}-*/*"))
        found.append([path.read_bytes() for path in files])
        assert len(files) == 12
    assert found[0] == found[1] == found[2]


def test_the_rows_that_are_described_are_the_rows_that_are_written(tmp_path: Path) -> None:
    corpus, config = write_corpus(tmp_path / "store", LENGTHS, 30), config_of()
    selected = select(config, corpus)
    told = describe(config, corpus, selected, np.dtype("<u2"))
    for split, windows in windows_of_splits(config, corpus, selected).items():
        write_rows(tmp_path / split, windows, corpus, 256, "split", 0.98)
        rows = load_rows(tmp_path / split)
        assert (told.splits[split].rows, told.splits[split].tokens) == (rows.num_rows, rows.length.sum())
        assert split == "validation" or [each.got for each in told.sources.values()] == [
            tally.tokens for tally in rows.tallies
        ]


def test_overflow_error_names_the_first_long_document_and_counts_all(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [[1, 2, 3], [4, 99, 5, 98, 97]], 3)
    with pytest.raises(DataError, match=r"^file-1:2: 99 tokens, but a row has 64; 3 documents are too long; make rows"):
        select(config_of(sequence={"length": 64, "overflow": "error"}), corpus)
    assert select(config_of(sequence={"length": 99, "overflow": "error"}), corpus).mixture.budget > 0


def test_a_source_without_documents_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^sources\.b: no documents; b holds no text"):
        select(config_of(), write_corpus(tmp_path, [[1, 2, 3], []], 3))


def test_a_source_of_which_all_is_held_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^sources\.b: all 1 documents are held out; lower holdout\.fraction"):
        select(config_of(holdout={"fraction": 0.999}), write_corpus(tmp_path, [[5] * 3000, [7]], 3000))


def test_epochs_beyond_all_bounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^sources\.a: more than 2\^60 tokens would be selected"):
        select(config_of(sources={"a": {"path": "a", "epochs": 1e300}}), write_corpus(tmp_path, [[5, 6]], 3))
