"""From files to the corpus: what a unit's name promises, and when bad records stop a run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmt_prep import choice, documents, held, ingest, shards, store, tokenization
from llmt_prep.cache import origin_of
from llmt_prep.config import MixConfig
from llmt_prep.corpus import Corpus
from llmt_prep.engines import Encoded, Engine
from llmt_prep.executor import HERE
from llmt_prep.guard import EngineDiffers, distrust
from llmt_prep.ingest import tokenize_inputs
from llmt_prep.inputs import find_inputs
from llmt_prep.pipeline import build_dataset, dry_run, explain_cache
from llmt_prep.store import is_sound
from llmt_prep.tokenizer import load_tokenizer
from llmt_prep.unit_task import TokenizeTask
from llmt_shared.errors import DataError, FormatError


def tokenize(mix: dict[str, Any], cache: Path) -> Corpus:
    config = MixConfig.model_validate(mix)
    inputs = find_inputs(config, cache, HERE, rehash=False, remember=True)
    return tokenize_inputs(config, inputs, load_tokenizer(mix["tokenizer"]), cache, HERE)


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


def directories(corpus: Corpus) -> list[Path]:
    return [corpus.directory(unit) for unit in range(len(corpus.units))]


def test_a_file_that_grew_is_tokenized_again_only_at_its_end(mix: dict[str, Any], tmp_path: Path) -> None:
    source, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    lines = [json.dumps({"text": f"document {i} " * 10}) + "\n" for i in range(200)]
    source.write_text("".join(lines))
    mix |= {"sources": {"a": {"path": str(source)}}, "unit_size": 2000}
    before = set(directories(tokenize(mix, cache)))
    source.write_text("".join([*lines, '{"text": "one more"}\n']))
    grown = directories(tokenize(mix, cache))
    assert set(grown[:-2]) <= before
    assert grown[-1] not in before


def test_an_edited_line_is_tokenized_again_with_its_unit_alone(mix: dict[str, Any], tmp_path: Path) -> None:
    source, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    lines = [json.dumps({"text": f"document {i:03} " * 10}) + "\n" for i in range(200)]
    source.write_text("".join(lines))
    mix |= {"sources": {"a": {"path": str(source)}}, "unit_size": 2000}
    before = directories(tokenize(mix, cache))
    source.write_text("".join(lines).replace("document 100", "dokument 100"))
    after = directories(tokenize(mix, cache))
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 1


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[TokenizeTask]:
    """What is tokenized, as it happens."""
    seen: list[TokenizeTask] = []

    def recorded(task: TokenizeTask, run_task: Callable[..., Any] = ingest.run_task) -> Any:
        seen.append(task)
        return run_task(task)

    monkeypatch.setattr(ingest, "run_task", recorded)
    return seen


def lengths(corpus: Corpus) -> list[list[int]]:
    return [corpus.open_unit(unit).lengths.tolist() for unit in range(len(corpus.units))]


def build(mix: dict[str, Any], **change: Any) -> str:
    output = f"{mix['output']}-{len(list(Path(mix['output']).parent.glob('data*')))}"
    return build_dataset(MixConfig.model_validate(mix | change | {"output": output}), workers=1).digest


def test_packing_in_another_way_tokenizes_nothing(mix: dict[str, Any], tasks: list[TokenizeTask]) -> None:
    build(mix)
    assert len(tasks) == 13
    weighted = {name: {"path": source["path"], "weight": 1} for name, source in mix["sources"].items()}
    for change in (
        {"sequence": {"length": 100, "overflow": "truncate"}},
        {"seed": 8, "holdout": {"fraction": 0}},
        {"sources": weighted, "budget": 5000},
        {"shard_size": 20_000, "packing": {"window": 10}},
    ):
        build(mix, **change)
        assert len(tasks) == 13


@pytest.mark.parametrize("change", [{"bos": "never"}, {"eos": "never"}, {"max_record_bytes": 2**20}])
def test_another_setting_tokenizes_all_again(
    mix: dict[str, Any], tasks: list[TokenizeTask], tmp_path: Path, change: dict[str, Any]
) -> None:
    for more in ({}, change):
        tokenize(mix | more, tmp_path / "cache")
    assert len(tasks) == 26


def test_another_tokenizer_tokenizes_all_again_and_the_first_is_kept(
    mix: dict[str, Any], tasks: list[TokenizeTask], tokenizer_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    other = mix | {"tokenizer": str(tmp_path / "other"), "eos": "never"}
    for each, in_all in ((mix, 13), (other, 26), (mix, 26), (other, 26)):
        tokenize(each, tmp_path / "cache")
        assert len(tasks) == in_all


def test_a_reader_setting_tokenizes_its_source_again(
    mix: dict[str, Any], tasks: list[TokenizeTask], tmp_path: Path
) -> None:
    tokenize(mix, tmp_path / "cache")
    mix["sources"]["plain"]["record"] = "line"
    tokenize(mix, tmp_path / "cache")
    assert [Path(task.unit.path).suffix for task in tasks[13:]] == [".txt"] * 10


def test_a_changed_file_is_tokenized_again_alone(
    mix: dict[str, Any], tasks: list[TokenizeTask], tmp_path: Path
) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"the file of number {number}")
    mix["sources"] = {"a": {"path": str(tmp_path / "*.txt")}}
    tokenize(mix, tmp_path / "cache")
    (tmp_path / "3.txt").write_text("another text")
    tokenize(mix, tmp_path / "cache")
    assert [Path(task.unit.path).name for task in tasks[5:]] == ["3.txt"]


def test_another_unit_size_gives_the_same_dataset(mix: dict[str, Any], tasks: list[TokenizeTask]) -> None:
    assert build(mix) == build(mix, unit_size=5000)
    assert len(tasks) > 20


@pytest.mark.parametrize("name", ["tokens", "lengths", "text_hash", "meta.json", "origin.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_unit_is_named_and_made_again(
    mix: dict[str, Any], tasks: list[TokenizeTask], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str, damage: str,
) -> None:  # fmt: skip
    cache = tmp_path / "cache"
    wanted = lengths(tokenize(mix, cache))
    unit = Path(tasks[1].directory)
    content = (unit / name).read_bytes()
    if damage == "missing":
        (unit / name).unlink()
    else:
        (unit / name).write_bytes(
            content[: len(content) // 2] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:]
        )
    assert not is_sound(unit)
    capsys.readouterr()
    assert lengths(tokenize(mix, cache)) == wanted
    assert f"{unit}: this unit of the cache is damaged" in capsys.readouterr().err
    assert [task.directory for task in tasks[13:]] == [str(unit)]
    assert is_sound(unit)
    assert (unit / name).read_bytes() == content
    assert [path.name for path in unit.parent.iterdir()] == [unit.name]


def test_a_unit_that_another_run_mended_meanwhile_is_left_to_it(
    mix: dict[str, Any], tasks: list[TokenizeTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize(mix, tmp_path / "cache")
    (directory, *_), answers = [Path(task.directory) for task in tasks], iter([False])
    monkeypatch.setattr(store, "is_sound", lambda path: next(answers, True) if path == directory else is_sound(path))
    inode = directory.stat().st_ino
    tokenize(mix, tmp_path / "cache")
    assert directory.stat().st_ino == inode
    assert len(tasks) == 13


def test_a_dry_run_neither_uses_nor_mends_a_damaged_unit(mix: dict[str, Any], tasks: list[TokenizeTask]) -> None:
    build(mix)
    wanted = dry_run(MixConfig.model_validate(mix), workers=1)
    unit = Path(tasks[0].directory)
    (unit / "lengths").write_bytes(b"\1\0\0\0" * ((unit / "lengths").stat().st_size // 4))
    before = {path: path.stat().st_mtime_ns for path in Path(mix["output"]).parent.rglob("*")}
    assert dry_run(MixConfig.model_validate(mix), workers=1) == wanted
    assert {path: path.stat().st_mtime_ns for path in Path(mix["output"]).parent.rglob("*")} == before
    assert len(tasks) == 14


def test_a_damaged_tokenizer_in_the_cache_is_mended(mix: dict[str, Any], tmp_path: Path, tokenizer_dir: Path) -> None:
    tokenize(mix, tmp_path / "cache")
    (stored,) = (tmp_path / "cache").glob("tokenizers/*/tokenizer.json")
    stored.write_bytes(stored.read_bytes().replace(b"document", b"tnemucod"))
    tokenize(mix | {"unit_size": 5000}, tmp_path / "cache")
    assert stored.read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


def test_a_unit_says_what_it_was_made_of(mix: dict[str, Any], tasks: list[TokenizeTask], tmp_path: Path) -> None:
    tokenize(mix, tmp_path / "cache")
    for task in tasks:
        origin = origin_of(Path(task.directory))
        assert origin == task.origin
        assert origin.file == task.unit.path
        assert origin.tokenizer == mix["tokenizer"]


@pytest.mark.parametrize(("workers", "hosts"), [(1, 1), (2, 1), (20, 1), (1000, 1), (20, 2)])
def test_a_task_reads_ahead_what_its_worker_does_next(
    mix: dict[str, Any], tmp_path: Path, workers: int, hosts: int
) -> None:
    """Of several machines it is not known which is given what."""
    config, given = MixConfig.model_validate(mix | {"unit_size": 5000}), []

    def run(function: Any, tasks: list[tuple[TokenizeTask]]) -> Any:
        given.extend(task for (task,) in tasks)
        return iter([])

    executor = SimpleNamespace(workers=workers, hosts=hosts, run=run)
    inputs = find_inputs(config, tmp_path / "cache", HERE, rehash=False, remember=True)
    with pytest.raises(FormatError):  # for want of units
        tokenize_inputs(config, inputs, load_tokenizer(mix["tokenizer"]), tmp_path / "cache", executor)
    ranges = [(task.unit.path, task.unit.start, task.unit.stop) for task in given]
    assert len(ranges) > 20
    known = ranges[workers:] if hosts == 1 else []
    assert [task.ahead for task in given] == [*known, *[None] * (len(ranges) - len(known))]


@pytest.mark.parametrize("is_there", [True, False])
def test_what_cannot_be_read_ahead_stops_nothing(
    mix: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    if is_there:
        monkeypatch.setattr(os, "posix_fadvise", lambda *_: (_ for _ in ()).throw(OSError(22, "no")), raising=False)
    else:
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert tokenize(mix, tmp_path / "cache").num_sources == 3


def test_progress_counts_every_byte_of_a_parquet_file_once(
    mix: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, totals = tmp_path / "a.parquet", {}
    pq.write_table(pa.table({"text": [f"document {i}" for i in range(100)]}), path, row_group_size=15)
    stage = ingest.stage
    monkeypatch.setattr(ingest, "stage", lambda name, total, unit: totals.update({name: total}) or stage(name, 0))
    tokenize(mix | {"sources": {"a": {"path": str(path)}}, "unit_size": 1}, tmp_path / "cache")
    assert totals == {"check cache": 0, "tokenize": path.stat().st_size}


# Engines


def inexact_engine(tokenizer: Any, keep_control: bool) -> Engine:
    return Engine(
        "fastokens 0", lambda texts: Encoded(np.full(len(texts), 7, np.uint32), np.ones(len(texts), np.int64))
    )


def test_units_of_an_engine_that_was_found_inexact_are_made_again_by_the_reference(
    mix: dict[str, Any],
    tasks: list[TokenizeTask],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = build(mix, engine="tokenizers", cache=str(tmp_path / "reference"))
    held.held_fast_engine.cache_clear()
    monkeypatch.setattr(held, "fast_engine", inexact_engine)
    with monkeypatch.context() as patch:  # as if the engine were right until here
        patch.setattr(tokenization, "first_difference", lambda *arguments: None)
        patch.setattr(choice, "first_difference", lambda *arguments: None)
        assert build(mix) != wanted
    with monkeypatch.context() as patch:
        patch.setattr(choice, "first_difference", lambda *arguments: None)
        with pytest.raises(EngineDiffers, match=r":1: fastokens 0 does not give the tokens of"):
            build(mix, eos="never")
    tasks.clear()
    assert build(mix) == wanted
    assert len(tasks) == 13
    assert not any(task.is_fast for task in tasks)
    assert "was made by fastokens 0, which is not exact; it is tokenized again" in capsys.readouterr().err
    held.held_fast_engine.cache_clear()


@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
def test_the_run_report_tells_engines_and_what_the_guard_compared(mix: dict[str, Any], engine: str) -> None:
    built = build_dataset(MixConfig.model_validate(mix | {"engine": engine}), workers=1)
    report = json.loads((built.path / "run.json").read_text())
    name = "fastokens" if engine == "auto" else "tokenizers"
    assert set(report["units_by_engine"]) == {f"{name} {report['versions'][name]}"}
    assert (report["guard"]["documents_compared"] > 0) == (engine == "auto")
    assert report["guard"]["batches_fallen_back"] == 0


def test_the_dataset_does_not_depend_on_the_engine(mix: dict[str, Any], tmp_path: Path) -> None:
    digests = {build(mix, engine=engine, cache=str(tmp_path / engine)) for engine in ("fastokens", "tokenizers")}
    assert len(digests) == 1


def test_a_plan_that_was_made_of_other_units_is_not_gone_on_with(
    mix: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = build(mix, engine="tokenizers", cache=str(tmp_path / "reference"))
    config = MixConfig.model_validate(mix | {"output": str(tmp_path / "stopped")})
    held.held_fast_engine.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(held, "fast_engine", inexact_engine)
        patch.setattr(choice, "first_difference", lambda *arguments: None)
        patch.setattr(tokenization, "first_difference", lambda *arguments: None)
        patch.setattr(shards, "finish_split", lambda task: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_dataset(config, workers=1)
    held.held_fast_engine.cache_clear()
    (folder,) = (tmp_path / ".llmt-cache" / "tokenizers").iterdir()
    distrust(folder, "fastokens 0")
    assert build_dataset(config, workers=1).digest == wanted


def test_whether_bad_records_stop_a_run_early_does_not_depend_on_the_cache(mix: dict[str, Any], tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"text": "x"}\n' * 30_000)
    bad.write_text('{"text": 5}\n' * 150 + '{"text": "x"}\n' * 3_000)
    tokenize(mix | {"sources": {"a": {"path": str(good)}}}, tmp_path / "cache")
    both = mix | {"sources": {"a": {"path": [str(good), str(bad)]}}}
    assert tokenize(both, tmp_path / "cache").num_documents == 33_000


def test_a_dry_run_and_the_explanation_know_of_an_engine_found_inexact(
    mix: dict[str, Any], tasks: list[TokenizeTask], tmp_path: Path
) -> None:
    config = MixConfig.model_validate(mix | {"cache": str(tmp_path / "cache")})
    built = build_dataset(config, workers=1)
    (folder,) = (tmp_path / "cache" / "tokenizers").iterdir()
    (name,) = json.loads((built.path / "run.json").read_text())["units_by_engine"]
    distrust(folder, name)
    use = explain_cache(config, workers=1)
    assert sum(source.reused.units for source in use.sources.values()) == 0
    assert {reason.why for source in use.sources.values() for reason in source.reasons} == {
        (f"the stored unit was made by {name}, which is not exact",)
    }
    tasks.clear()
    dry_run(config, workers=1)
    assert len(tasks) == 13
    assert not any(task.is_fast for task in tasks)
