"""From files to the corpus: what a unit's name promises, and when bad records stop a run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmt_prep import documents
from llmt_prep.config import MixConfig
from llmt_prep.corpus import Corpus
from llmt_prep.ingest import tokenize_inputs
from llmt_prep.inputs import find_inputs
from llmt_prep.tokenizer import load_tokenizer
from llmt_shared.errors import DataError


def tokenize(mix: dict[str, Any], cache: Path) -> Corpus:
    config = MixConfig.model_validate(mix)
    inputs = find_inputs(config, cache, 1, rehash=False, remember=True)
    return tokenize_inputs(config, inputs, load_tokenizer(mix["tokenizer"]), cache, 1)


def test_a_file_that_changes_while_it_is_read_leaves_no_unit(
    mix: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read = tmp_path / "a.jsonl", documents.read
    source.write_text(json.dumps({"text": "before"}) + "\n")
    mix["sources"] = {"a": {"path": str(source)}}
    wanted = tokenize(mix, tmp_path / "another").text_hashes(0, 1).tolist()
    times = source.stat().st_atime_ns, source.stat().st_mtime_ns

    def changed(*arguments: Any) -> Any:
        source.write_text(json.dumps({"text": "after!"}) + "\n")
        return read(*arguments)

    monkeypatch.setattr(documents, "read", changed)
    with pytest.raises(DataError, match="changed while it was read"):
        tokenize(mix, tmp_path / "cache")
    monkeypatch.undo()
    source.write_text(json.dumps({"text": "before"}) + "\n")
    os.utime(source, ns=times)
    assert tokenize(mix, tmp_path / "cache").text_hashes(0, 1).tolist() == wanted


def bad_and_good(mix: dict[str, Any], tmp_path: Path, bad: int, good: int) -> Path:
    """A file whose bad records come first, read in many units."""
    lines = ['{"text": 5}\n'] * bad + ['{"text": "x"}\n'] * good
    (tmp_path / "a.jsonl").write_text("".join(lines))
    mix |= {"sources": {"a": {"path": str(tmp_path / "a.jsonl")}}, "unit_size": 2400}
    return tmp_path / "cache"


def test_bad_records_that_come_first_do_not_stop_a_run_that_may_have_them(mix: dict[str, Any], tmp_path: Path) -> None:
    cache = bad_and_good(mix, tmp_path, bad=200, good=5000)
    assert tokenize(mix | {"max_bad": "5%"}, cache).document_borders[-1] == 5000


def test_a_wrong_field_stops_the_run_early(mix: dict[str, Any], tmp_path: Path) -> None:
    cache = bad_and_good(mix, tmp_path, bad=5000, good=0)
    with pytest.raises(DataError, match="max_bad allows 1%"):
        tokenize(mix, cache)
    assert len(list(cache.glob("units/*/*/meta.json"))) < 5


@pytest.mark.parametrize("max_bad", [199, "3%"])
def test_one_bad_record_too_many_stops_the_run(mix: dict[str, Any], tmp_path: Path, max_bad: object) -> None:
    cache = bad_and_good(mix, tmp_path, bad=200, good=5000)
    with pytest.raises(DataError, match="records cannot be used"):
        tokenize(mix | {"max_bad": max_bad}, cache)


def test_a_file_that_grew_is_tokenized_again_only_at_its_end(mix: dict[str, Any], tmp_path: Path) -> None:
    source, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    lines = [json.dumps({"text": f"document {i} " * 10}) + "\n" for i in range(200)]
    source.write_text("".join(lines))
    mix |= {"sources": {"a": {"path": str(source)}}, "unit_size": 2000}
    before = {unit.directory for unit in tokenize(mix, cache).units}
    source.write_text("".join([*lines, '{"text": "one more"}\n']))
    grown = [unit.directory for unit in tokenize(mix, cache).units]
    assert set(grown[:-2]) <= before
    assert grown[-1] not in before


def test_an_edited_line_is_tokenized_again_with_its_unit_alone(mix: dict[str, Any], tmp_path: Path) -> None:
    source, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    lines = [json.dumps({"text": f"document {i:03} " * 10}) + "\n" for i in range(200)]
    source.write_text("".join(lines))
    mix |= {"sources": {"a": {"path": str(source)}}, "unit_size": 2000}
    before = [unit.directory for unit in tokenize(mix, cache).units]
    source.write_text("".join(lines).replace("document 100", "dokument 100"))
    after = [unit.directory for unit in tokenize(mix, cache).units]
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 1
