"""What `pack --explain-cache` says: the fields in which a unit differs; and asking changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmt_prep import tokenization
from llmt_prep.cache import cache_of, in_use, unit_folders
from llmt_prep.cache_contents import prune
from llmt_prep.config import MixConfig
from llmt_prep.executor import HERE
from llmt_prep.explain import CacheUse, render
from llmt_prep.ingest import tokenize_inputs
from llmt_prep.inputs import find_inputs
from llmt_prep.pipeline import build_dataset, explain_cache
from llmt_prep.tokenizer import load_tokenizer


@pytest.fixture
def lines(mix: dict[str, Any], tmp_path: Path) -> Path:
    """A source of about ten units, beside that of the plain files."""
    path = tmp_path / "a.jsonl"
    write(path, range(200))
    mix |= {"unit_size": 2000, "holdout": {"fraction": 0}}
    mix["sources"] = {"lines": {"path": str(path)}, "plain": mix["sources"]["plain"]}
    return path


def write(path: Path, numbers: Any) -> None:
    path.write_text("".join(json.dumps({"text": f"document {i:04}", "body": "b" * 50}) + "\n" for i in numbers))


def build(mix: dict[str, Any]) -> None:
    """The part of packing that fills the cache."""
    config = MixConfig.model_validate(mix)
    with in_use(cache_of(config)):
        inputs = find_inputs(config, cache_of(config), HERE, rehash=False, remember=True)
        tokenize_inputs(config, inputs, load_tokenizer(mix["tokenizer"]), cache_of(config), HERE)


def explain(mix: dict[str, Any]) -> CacheUse:
    return explain_cache(MixConfig.model_validate(mix), workers=1)


def reasons(mix: dict[str, Any], source: str = "lines") -> list[str]:
    return ["; ".join(each.why) for each in explain(mix).sources[source].reasons]


def test_what_was_never_packed_was_never_seen(mix, lines):
    use = explain(mix).sources
    assert use["lines"].to_tokenize.bytes == lines.stat().st_size
    assert use["lines"].reused.units == use["plain"].reused.units == 0
    assert reasons(mix) == reasons(mix, "plain") == ["never seen"]


def test_what_is_there_is_reused(mix, lines):
    build(mix)
    use = explain(mix | {"sequence": {"length": 99}, "seed": 1}).sources
    assert [each.to_tokenize.units for each in use.values()] == [0, 0]
    assert use["lines"].reused.units == -(-lines.stat().st_size // 2000)
    assert use["lines"].reused.bytes == lines.stat().st_size
    assert use["plain"].reused.units == 10


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"bos": "never"}, "bos: 'auto' -> 'never'"),
        ({"eos": "never", "max_record_bytes": 4096}, "eos: 'always' -> 'never'; max_record_bytes: 134217728 -> 4096"),
        ({"special_tokens_in_text": "keep"}, "special_tokens_in_text: 'as_text' -> 'keep'"),
        ({"unit_size": 3000}, "unit_size: 2000 -> 3000"),
    ],
)
def test_a_setting_that_differs_is_named_with_both_values(mix, lines, change, why):
    build(mix)
    assert reasons(mix | change) == [why]


def test_a_reader_setting_of_one_source_leaves_the_other_alone(mix, lines):
    build(mix)
    mix["sources"]["lines"]["text_field"] = "body"
    assert reasons(mix) == ["text_field: 'text' -> 'body'"]
    assert reasons(mix, "plain") == []


def test_another_tokenizer_is_named_with_its_digest(mix, lines, tokenizer_dir, tmp_path):
    build(mix)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    (other / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    for mine in ("lines", "plain"):
        (why,) = reasons(mix | {"tokenizer": str(other)}, mine)
        assert why.startswith(f"tokenizer {tokenizer_dir} -> {other} (digest ")


def test_another_version_of_tokenization_is_named(mix, lines, monkeypatch):
    build(mix)
    monkeypatch.setattr(tokenization, "TOKENIZATION_VERSION", 99)
    assert reasons(mix) == ["TOKENIZATION_VERSION: 2 -> 99"]


def test_of_a_file_that_grew_only_the_end_is_to_tokenize(mix, lines):
    build(mix)
    write(lines, range(220))
    use = explain(mix).sources["lines"]
    assert reasons(mix) == [f"content of {lines} changed"]
    assert 1 <= use.to_tokenize.units <= 2
    assert use.reused.units >= 7


def test_a_file_that_changed_under_another_setting_differs_in_both(mix, lines):
    build(mix)
    write(lines, range(1000, 1200))
    assert reasons(mix | {"bos": "never"}) == [f"bos: 'auto' -> 'never'; content of {lines} changed"]


def test_a_unit_whose_content_stayed_does_not_blame_its_file(mix, lines):
    build(mix)
    write(lines, range(220))
    assert "bos: 'auto' -> 'never'" in reasons(mix | {"bos": "never"})


def test_the_nearest_of_several_is_compared_with(mix, lines):
    for number, change in enumerate(({"bos": "never", "eos": "never"}, {"bos": "never"})):
        build(mix | change | {"output": f"{mix['output']}{number}"})
    assert reasons(mix) == ["bos: 'never' -> 'auto'"]


def test_a_moved_file_is_reused(mix, lines, tmp_path):
    build(mix)
    lines.rename(tmp_path / "b.jsonl")
    mix["sources"]["lines"]["path"] = str(tmp_path / "b.jsonl")
    assert reasons(mix) == []


def test_a_file_that_is_the_same_but_compressed_differs_in_content(mix, lines, tmp_path):
    import gzip

    build(mix)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    mix["sources"]["lines"]["path"] = str(tmp_path / "a.jsonl.gz")
    assert reasons(mix) == ["never seen"]


def test_a_pruned_unit_is_not_there(mix, lines):
    build(mix)
    cache = Path(mix["output"]).parent / ".llmt-cache"
    kept = [folder.name for folder in unit_folders(cache) if "a.jsonl" in (folder / "origin.json").read_text()][:-1]
    prune(cache, wanted=kept)
    assert reasons(mix) == ["not tokenized yet, or pruned"]
    assert explain(mix).sources["lines"].to_tokenize.units == 1


def test_a_damaged_unit_is_to_tokenize(mix, lines):
    build(mix)
    cache = Path(mix["output"]).parent / ".llmt-cache"
    next(unit_folders(cache)).joinpath("tokens").write_bytes(b"")
    found = reasons(mix) + reasons(mix, "plain")
    assert found == ["the stored unit is damaged"]


def test_a_unit_that_comes_twice_is_tokenized_once(mix, lines):
    mix["sources"]["again"] = {"path": str(lines)}
    use = explain(mix).sources
    assert use["lines"].to_tokenize == use["again"].reused
    assert use["again"].to_tokenize.units == 0


def test_the_explanation_is_what_packing_does(mix, lines):
    build(mix)
    write(lines, range(3, 200))
    mix |= {"bos": "never", "output": mix["output"] + "2"}
    cache = Path(mix["output"]).parent / ".llmt-cache"
    before, use = set(unit_folders(cache)), explain(mix).sources
    build_dataset(MixConfig.model_validate(mix), workers=1)
    assert len(set(unit_folders(cache)) - before) == sum(each.to_tokenize.units for each in use.values())


def test_asking_changes_nothing(mix, lines):
    explain(mix)
    assert not Path(mix["output"]).parent.exists()
    build(mix)
    folder = Path(mix["output"]).parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    explain(mix | {"bos": "never"})
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_answer_is_shown_as_a_table_with_reasons(mix, lines):
    build(mix)
    shown = render(explain(mix | {"bos": "never"}))
    assert shown.startswith("source")
    assert "lines:\n  " in shown
    assert "10 units" in shown
    assert "bos: 'auto' -> 'never'" in shown


def test_many_reasons_are_cut_short_in_text_alone(mix, lines, tmp_path):
    mix["sources"] = {"many": {"path": str(tmp_path / "many")}}
    (tmp_path / "many").mkdir()
    for content in ("one", "another"):
        for number in range(12):
            (tmp_path / "many" / f"{number}.txt").write_text(f"{content} {number}")
        build(mix) if content == "one" else None
    use = explain(mix)
    assert len(use.sources["many"].reasons) == 12
    assert "and 4 more reasons; --json lists all" in render(use)
