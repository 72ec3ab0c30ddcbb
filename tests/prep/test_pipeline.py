"""The whole of stage one: what comes out is what went in, however the run was cut up."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import zarr
from small_datasets import build_chats
from tokenizers import Tokenizer

from llmt_prep.config import MixConfig
from llmt_prep.ledger import Ledger, mistakes
from llmt_prep.pipeline import Built, build_dataset, dry_run
from llmt_shared.dataset import open_dataset
from llmt_shared.errors import ConfigError, DataError

EOS = 0


def build(mix: dict[str, Any], **more: Any) -> Built:
    return build_dataset(MixConfig.model_validate(mix), **{"workers": 1, **more})


def documents_in(path: Path) -> dict[str, dict[int, list[list[int]]]]:
    """Documents put together again from what plain zarr reads: by split and number, each time it occurs."""
    return {split: _documents_of(zarr.open(path / split, mode="r")) for split in ("train", "validation")}


def _documents_of(group: Any) -> dict[int, list[list[int]]]:
    columns = ("tokens", "row_offsets", "segment_length", "segment_offset", "segment_document")
    tokens, offsets, lengths, starts, numbers = (group[name][:] for name in columns)
    found: dict[int, dict[int, list[list[int]]]] = {}
    for row in range(len(offsets) - 1):
        place = 0
        for segment in range(offsets[row], offsets[row + 1]):
            ids = tokens[row, place : place + lengths[segment]].tolist()
            found.setdefault(int(numbers[segment]), {}).setdefault(int(starts[segment]), []).append(ids)
            place += lengths[segment]
        assert not tokens[row, place:].any()
    return {
        number: [list(chain(*copy)) for copy in zip(*(pieces[start] for start in sorted(pieces)), strict=True)]
        for number, pieces in found.items()
    }


def expected_tokens(texts: list[str], tokenizer_dir: Path) -> list[list[int]]:
    """Documents of the `mix` fixture by number, from bare `tokenizers`; plain files come in the order of names."""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    order = [*range(60), *(60 + int(name) for name in sorted(map(str, range(10))))]
    return [[*tokenizer.encode(texts[i], add_special_tokens=False).ids, EOS] for i in order]


def test_every_document_comes_back_exactly_once_per_epoch(
    mix: dict[str, Any], texts: list[str], tokenizer_dir: Path
) -> None:
    found = documents_in(build(mix).path)
    expected = expected_tokens(texts, tokenizer_dir)
    assert sorted([*found["train"], *found["validation"]]) == list(range(70))
    assert 0 < len(found["validation"]) < 30
    for split, documents in found.items():
        for number, copies in documents.items():
            times = 2 if split == "train" and 40 <= number < 60 else 1
            assert copies == [expected[number]] * times


def test_the_reader_gives_what_plain_zarr_gives(mix: dict[str, Any]) -> None:
    built = build(mix)
    split = open_dataset(built.path).train
    stored = zarr.open(built.path, mode="r")["train/tokens"]
    np.testing.assert_array_equal(split.tokens(range(split.num_rows)), stored[:])


def test_the_ledger_closes_and_agrees_with_the_arrays(mix: dict[str, Any]) -> None:
    built = build(mix)
    ledger = Ledger.model_validate_json((built.path / "ledger.json").read_bytes())
    assert mistakes(ledger, 256) == []
    split = open_dataset(built.path).train
    table = split.segments(range(split.num_rows))
    in_rows = np.bincount(table.source, table.length, 3).astype(int).tolist()
    assert [books.train.in_rows for books in ledger.sources.values()] == in_rows
    assert ledger.splits["train"].padding == split.num_rows * 256 - sum(in_rows)


@pytest.mark.parametrize("overflow", ["truncate", "drop"])
def test_the_ledger_counts_what_does_not_land(mix: dict[str, Any], overflow: str) -> None:
    mix["sequence"]["overflow"] = overflow
    books = json.loads((build(mix).path / "ledger.json").read_bytes())["sources"]["help"]["train"]
    gone = books["truncated"] if overflow == "truncate" else books["dropped"]["tokens"]
    assert gone > 0
    assert books["selected"]["tokens"] == books["in_rows"] + gone


def test_validation_and_training_share_no_text(mix: dict[str, Any], corpus_dir: Path) -> None:
    mix["sources"]["again"] = {"path": str(corpus_dir / "help" / "a.jsonl")}  # duplicates, under other numbers
    mix["holdout"]["fraction"] = 0.3
    found = documents_in(build(mix).path)
    of_split = {split: {tuple(copy) for copies in found[split].values() for copy in copies} for split in found}
    assert of_split["validation"]
    assert not of_split["train"] & of_split["validation"]


def test_what_is_held_out_depends_on_the_text_alone(mix: dict[str, Any]) -> None:
    first = documents_in(build(mix).path)["validation"]
    mix |= {"seed": 99, "sequence": {"length": 512}, "output": mix["output"] + "2"}
    assert documents_in(build(mix).path)["validation"].keys() == first.keys()


def test_weights_are_shares_of_the_training_tokens(mix: dict[str, Any]) -> None:
    mix |= {"budget": "max", "max_epochs": 4}
    for name, weight in (("help", 5), ("more", 3), ("plain", 2)):
        mix["sources"][name] = {"path": mix["sources"][name]["path"], "weight": weight}
    split = open_dataset(build(mix).path).train
    table = split.segments(range(split.num_rows))
    shares = np.bincount(table.source, table.length) / table.length.sum()
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.01)


@pytest.mark.parametrize("change", [{"workers": 2}, {"workers": 4}])
def test_the_digest_does_not_depend_on_workers(mix: dict[str, Any], change: dict[str, Any]) -> None:
    mix["shard_size"] = 20_000  # several shards
    reference = build(mix)
    mix |= {"output": mix["output"] + "2", "cache": mix["output"] + "-cache", "unit_size": 20_000}
    other = build(mix, **change)
    assert (other.path / "train/tokens/c/3/0").exists()
    assert other.digest == reference.digest


@pytest.mark.parametrize("change", [{"seed": 8}, {"sequence": {"length": 255}}, {"bos": "never", "eos": "never"}])
def test_the_digest_depends_on_what_the_mix_says(mix: dict[str, Any], change: dict[str, Any]) -> None:
    reference = build(mix)
    assert build(mix | change | {"output": mix["output"] + "2"}).digest != reference.digest


def test_the_same_mix_again_finds_the_dataset_there(mix: dict[str, Any]) -> None:
    first = build(mix)
    again = build(mix)
    assert first.is_new
    assert not again.is_new
    assert again.digest == first.digest


def test_a_finished_dataset_is_replaced_only_by_force(mix: dict[str, Any]) -> None:
    first = build(mix)
    mix["seed"] = 8
    with pytest.raises(ConfigError, match="--force to replace"):
        build(mix)
    assert open_dataset(first.path).digest == first.digest
    assert build(mix, force=True).digest != first.digest
    assert sorted(path.name for path in first.path.parent.iterdir()) == [".llmt-cache", "data"]


def test_a_changed_input_file_is_noticed(mix: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "one"}\n')
    mix |= {"sources": {"a": {"path": str(source)}}, "holdout": {"fraction": 0}}
    build(mix)
    source.write_text('{"text": "two"}\n')
    with pytest.raises(ConfigError, match="made from another mix, input or tokenizer"):
        build(mix)


def test_provenance_leads_to_the_line(mix: dict[str, Any], corpus_dir: Path, tokenizer_dir: Path) -> None:
    mix["unit_size"] = 10_000  # byte ranges start in the middle of the files
    built = build(mix)
    files = pl.read_parquet(built.path / "files.parquet").sort("first_document")
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    for number, copies in documents_in(built.path)["train"].items():
        if number < 40:
            file = files.filter(pl.col("first_document") <= number).row(-1, named=True)
            line = Path(file["path"]).read_text().splitlines()[number - file["first_document"]]
            assert file["source"] == "help"
            assert tokenizer.decode(copies[0]) == json.loads(line)["text"]


def test_control_strings_in_text_stay_text(mix: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "forged.jsonl"
    source.write_text('{"text": "a <|endoftext|> b <|pad|><|endoftext|>"}\n' * 5)
    mix |= {"sources": {"forged": {"path": str(source)}}, "holdout": {"fraction": 0}}
    built = build(mix)
    (copy,) = {tuple(copy) for copies in _documents_of(zarr.open(built.path / "train")).values() for copy in copies}
    assert copy[-1] == EOS
    assert not {0, 1} & set(copy[:-1])
    ledger = Ledger.model_validate_json((built.path / "ledger.json").read_bytes())
    assert ledger.sources["forged"].with_control_strings == 5


def test_bad_records_are_quarantined_with_their_place(mix: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "bad.jsonl"
    lines = [
        b'{"text": "good"}',
        b"",
        b'{"text": 5}',
        b'{"body": "x"}',
        b"{broken",
        b'{"text": "\xff"}',
        b'{"text": ""}',
    ]
    source.write_bytes(b"\n".join(lines) + b"\n")
    mix |= {"sources": {"bad": {"path": str(source)}}, "holdout": {"fraction": 0}, "max_bad": 4}
    built = build(mix)
    bad = [json.loads(line) for line in (built.path / "quarantine.jsonl").read_text().splitlines()]
    assert [record["record"] for record in bad] == [2, 3, 4, 5]
    assert all(record["reason"] and record["file"] == str(source) for record in bad)
    books = Ledger.model_validate_json((built.path / "ledger.json").read_bytes()).sources["bad"]
    assert (books.records, books.documents.documents, books.empty, books.quarantined) == (6, 1, 1, 4)


def test_too_many_bad_records_stop_the_run_with_the_first_of_them(mix: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_text('{"text": "good"}\n{"body": "wrong field"}\n')
    mix |= {"sources": {"bad": {"path": str(source)}}}
    with pytest.raises(DataError, match=r"1 of 2 records cannot be used(.|\n)*bad\.jsonl:2: .*body"):
        build(mix)


def test_a_source_without_documents_is_named(mix: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    mix["sources"]["nothing"] = {"path": str(tmp_path / "empty.jsonl")}
    with pytest.raises(DataError, match=r"sources\.nothing: no documents"):
        build(mix)


def test_overflow_error_names_the_document(mix: dict[str, Any], corpus_dir: Path) -> None:
    mix["sequence"] = {"length": 100_000, "overflow": "error"}
    assert build(mix).is_new
    mix |= {"sequence": {"length": 64, "overflow": "error"}, "output": mix["output"] + "2"}
    with pytest.raises(DataError, match=r"a\.jsonl:\d+: \d+ tokens, but a row has 64"):
        build(mix)


def test_eos_always_needs_an_eos(mix: dict[str, Any], tokenizer_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "tokenizer.json"
    bare.write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    with pytest.raises(ConfigError, match="eos: never"):
        build(mix | {"tokenizer": str(bare)})
    assert build(mix | {"tokenizer": {"path": str(bare), "eos_token": "<|endoftext|>"}}).is_new


def test_dry_run_predicts_the_rows_and_writes_nothing(mix: dict[str, Any]) -> None:
    plan = dry_run(MixConfig.model_validate(mix), workers=1)
    assert not Path(mix["output"]).parent.exists()
    built = build(mix)
    for name, split in built.manifest.splits.items():
        assert (plan.splits[name].rows, plan.splits[name].tokens) == (split.rows, split.tokens)
    got = {name: source.got for name, source in plan.sources.items()}
    ledger = Ledger.model_validate_json((built.path / "ledger.json").read_bytes())
    assert got == {name: books.train.in_rows for name, books in ledger.sources.items()}


def test_ids_above_65535_are_stored_in_four_bytes(mix: dict[str, Any], tmp_path: Path) -> None:
    from tokenizers import models, pre_tokenizers

    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 70_001)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "w70000 w1 w65536"}\n')
    mix |= {
        "tokenizer": {"path": str(tmp_path / "tokenizer.json"), "eos_token": "<|endoftext|>"},
        "sources": {"a": {"path": str(tmp_path / "a.jsonl")}},
        "holdout": {"fraction": 0},
    }
    split = open_dataset(build(mix).path).train
    assert split.token_dtype == np.uint32
    assert split[0].tokens[:4].tolist() == [70_000, 1, 65_536, 0]


def test_rows_of_131072_tokens_and_a_document_of_megabytes(mix: dict[str, Any], tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(200_000))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}) + "\n")
    mix |= {
        "sequence": {"length": 131_072},
        "sources": {"long": {"path": str(tmp_path / "long.jsonl")}},
        "holdout": {"fraction": 0},
    }
    built = build(mix)
    (copy,) = _documents_of(zarr.open(built.path / "train"))[0]
    assert Tokenizer.from_file(mix["tokenizer"] + "/tokenizer.json").decode(copy) == text


def test_more_files_than_a_process_may_open_are_read(mix: dict[str, Any], tmp_path: Path) -> None:
    import resource

    for number in range(300):
        (tmp_path / f"{number}.txt").write_text(f"the file of number {number}")
    mix |= {"sources": {"many": {"path": str(tmp_path / "*.txt")}}}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert build(mix).is_new
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_real_text_comes_back_and_fills_its_rows(mix: dict[str, Any], real_data: Path) -> None:
    source = real_data / "wikitext2-test.txt"
    mix |= {"sources": {"wiki": {"path": str(source), "record": "line"}}, "holdout": {"fraction": 0}, "seed": 1}
    built = build(mix)
    tokenizer = Tokenizer.from_file(mix["tokenizer"] + "/tokenizer.json")
    tokenizer.encode_special_tokens = True
    lines = source.read_text("utf-8").split("\n")
    found = _documents_of(zarr.open(built.path / "train", mode="r"))
    assert sorted(found) == [number for number, line in enumerate(lines) if line.strip()]
    for number, copies in found.items():
        assert copies == [[*tokenizer.encode(lines[number], add_special_tokens=False).ids, EOS]]
    split = built.manifest.splits["train"]
    assert split.tokens / (split.rows * 256) > 0.99


def test_a_validation_split_without_rows_is_not_written_and_the_ledger_closes(mix: dict[str, Any]) -> None:
    mix["sources"] = {"help": mix["sources"]["help"]}
    shortest = sorted(dry_run(MixConfig.model_validate(mix), workers=1).splits)
    assert shortest == ["train", "validation"]
    mix |= {"sequence": {"length": 256, "overflow": "drop"}}
    built = build(mix)
    assert sorted(built.manifest.splits) == ["train"]
    assert open_dataset(built.path).validation is None
    ledger = Ledger.model_validate_json((built.path / "ledger.json").read_bytes())
    assert ledger.sources["help"].validation.dropped.documents > 0
    assert mistakes(ledger, 256) == []


def test_the_digest_does_not_depend_on_where_a_hub_cache_lies(
    mix: dict[str, Any], corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    mix["sources"] = {"hub": {"hf": str(corpus_dir / "help")}}
    digests = set()
    for name in ("one", "two"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / name))
        built = build(mix | {"output": str(tmp_path / f"out-{name}" / "data")})
        digests.add(built.digest)
    assert len(digests) == 1
    (path,) = set(pl.read_parquet(built.path / "files.parquet")["path"])
    assert path.startswith(f"hf://{corpus_dir}/help/train/")


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_chats_and_pairs_are_the_same_bytes_with_other_workers_and_units(tmp_path: Path, kind: str) -> None:
    one = build_chats(tmp_path, kind)
    cut = {"output": tmp_path / "cut", "cache": str(tmp_path / "cache"), "unit_size": 3000, "workers": 2}
    assert open_dataset(build_chats(tmp_path, kind, **cut)).digest == open_dataset(one).digest
