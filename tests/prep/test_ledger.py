"""The books close for a real plan, and a single lost or repeated document or token opens them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_corpus import write_corpus

from llmt_prep.config import MixConfig
from llmt_prep.ledger import Ledger, SplitLedger, mistakes, source_ledgers
from llmt_prep.rows import load_rows, write_rows
from llmt_prep.selection import Selected, select, windows_of_splits
from llmt_prep.tally import Tally

LENGTHS = [np.random.default_rng(3).integers(1, 90, 80).tolist(), list(range(1, 60))]


class Planned:
    """A plan over two sources, and what its ledger is made from."""

    def __init__(self, folder: Path) -> None:
        self.config = MixConfig.model_validate(
            {
                "output": "out",
                "tokenizer": "none",
                "sequence": {"length": 64, "overflow": "drop"},
                "holdout": {"fraction": 0.2},
                "sources": {"a": {"path": "a", "epochs": 1.6}, "b": {"path": "b"}},
            }
        )
        self.corpus = write_corpus(folder / "store", LENGTHS, 30)
        self.selected: Selected = select(self.config, self.corpus)
        self.tallies: dict[str, tuple[Tally, ...]] = {}
        self.in_rows: dict[str, list[int]] = {}
        self.rows: dict[str, int] = {}
        for split, windows in windows_of_splits(self.config, self.corpus, self.selected).items():
            write_rows(folder / split, windows, self.corpus, 64, "drop", 0.98)
            plan = load_rows(folder / split)
            source = np.searchsorted(self.corpus.source_borders, plan.document, "right") - 1
            self.rows[split] = plan.num_rows
            self.tallies[split] = plan.tallies
            self.in_rows[split] = np.bincount(source, plan.length, 2).astype(int).tolist()

    def mistakes(self) -> list[str]:
        files = {0: 1, 1: 1}
        books = source_ledgers(self.config, self.corpus, self.selected, files, self.tallies, self.in_rows)
        splits = {
            split: SplitLedger(
                rows=rows, in_rows=sum(self.in_rows[split]), padding=64 * rows - sum(self.in_rows[split])
            )
            for split, rows in self.rows.items()
        }
        return mistakes(Ledger(sources=books, splits=splits), 64)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    return Planned(tmp_path_factory.mktemp("planned"))


def test_the_books_of_a_plan_close(planned: Planned) -> None:
    assert planned.mistakes() == []


def test_a_token_lost_between_plan_and_rows_is_noticed(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    in_rows = {**planned.in_rows, "train": [planned.in_rows["train"][0] - 1, planned.in_rows["train"][1]]}
    monkeypatch.setattr(planned, "in_rows", in_rows)
    assert [line.split(":")[0] + line.split(":")[1] for line in planned.mistakes()] == ["a train tokens"]


@pytest.mark.parametrize(("split", "column"), [("train", "tokens"), ("train", "dropped"), ("validation", "tokens")])
def test_a_wrong_tally_is_noticed(planned: Planned, monkeypatch: pytest.MonkeyPatch, split: str, column: str) -> None:
    first, second = planned.tallies[split]
    wrong = replace(second, **{column: getattr(second, column) + 1})
    monkeypatch.setattr(planned, "tallies", {**planned.tallies, split: (first, wrong)})
    assert any(line.startswith(f"b: {split} tokens") for line in planned.mistakes())


def test_a_survey_that_reads_other_lengths_than_the_store_counted_is_noticed(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    surveys: Any = (replace(planned.selected.surveys[0], tokens=1), planned.selected.surveys[1])
    monkeypatch.setattr(planned, "selected", replace(planned.selected, surveys=surveys))
    assert any(line.startswith("a: tokens") for line in planned.mistakes())
