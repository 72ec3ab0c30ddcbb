"""verify finds what is wrong with a dataset, whatever is wrong with it, and nothing in a sound one."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_datasets
import small_tokenizers
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import build, copy, reseal, rewrite

from llmt_prep.verify import MEANINGS, as_text, find_problems, to_json

EOS = 0
COLUMNS = (
    "row_offsets", "row_targets", "segment_length", "segment_offset", "segment_document", "segment_source",
)  # fmt: skip
KINDS = [
    "mix.json", "ledger.json", "files.parquet", "quarantine.jsonl", "zarr.json", "train/zarr.json",
    "train/tokens/zarr.json", "train/tokens/c/0/0", "validation/tokens/c/0/0", "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json", *(f"train/{name}/c/0" for name in COLUMNS),
    *(f"validation/{name}/zarr.json" for name in COLUMNS),
]  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    return copy(sound, tmp_path / "data")


def codes(path: Path) -> list[str]:
    return [each.code for each in find_problems(path)]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "mix",
    [
        {},
        {"holdout": {"fraction": 0}},
        {"eos": "never"},
        {"sequence": {"length": 48, "overflow": "truncate"}},
        {"sequence": {"length": 48, "overflow": "drop"}, "max_epochs": 99},
        {"sequence": {"length": 100_000, "overflow": "error"}},
        {"special_tokens_in_text": "keep"},
        {"sequence": {"length": 2}},
        {"budget": 20_000},
    ],
    ids=str,
)
def test_a_sound_dataset_has_no_findings(tmp_path, mix):
    assert find_problems(build(tmp_path, **mix)) == []


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_a_sound_dataset_with_a_tokenizer_that_begins_texts_has_no_findings(tmp_path, bos):
    assert find_problems(build(tmp_path, small_tokenizers.bpe_with_bos(), bos=bos)) == []


def test_token_ids_above_16_bits_have_no_findings(tmp_path):
    tokenizer = small_tokenizers.byte_level_bpe()
    tokenizer.add_tokens([f"<extra {number}>" for number in range(66_000)])
    path = build(tmp_path, tokenizer)
    assert zarr.open_group(path, mode="r")["train/tokens"].dtype == np.uint32
    assert find_problems(path) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("damage", "code"),
    [(flip, "F004"), (lambda content: content[:-1], "F003"), (lambda content: content + b"\n", "F003")],
    ids=["flip", "truncate", "enlarge"],
)
def test_a_damaged_file_is_found_and_named(dataset, kind, damage, code):
    path = dataset / kind
    content = path.read_bytes() or b"x"  # an empty file has no bit to flip
    path.write_bytes(damage(content) if path.stat().st_size else content)
    found = find_problems(dataset)
    assert (found[0].code, found[0].place) == (code if path.stat().st_size > 1 else "F003", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_found_and_named(dataset, kind):
    (dataset / kind).unlink()
    assert [(each.code, each.place) for each in find_problems(dataset)] == [("F002", kind)]


def test_one_flipped_bit_in_a_chunk_is_the_file_and_its_crc(dataset):
    path = dataset / "train/tokens/c/0/0"
    path.write_bytes(flip(path.read_bytes()))
    assert codes(dataset) == ["F004", "F011"]


@given(st.data())
@settings(max_examples=25)
def test_any_flipped_byte_anywhere_is_found(sound, data):
    with tempfile.TemporaryDirectory() as folder:
        dataset = copy(sound, Path(folder) / "data")
        files = sorted(path for path in dataset.rglob("*") if path.is_file() and path.stat().st_size)
        path = data.draw(st.sampled_from([each for each in files if each.name not in ("run.json", "MANIFEST.json")]))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        assert path.relative_to(dataset).as_posix() in [each.place for each in find_problems(dataset)]


@given(st.data())
@settings(max_examples=25)
def test_a_damaged_manifest_never_ends_in_a_traceback(sound, data):
    with tempfile.TemporaryDirectory() as folder:
        path = copy(sound, Path(folder) / "data") / "MANIFEST.json"
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        find_problems(path.parent)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_a_manifest_that_cannot_be_read_is_one_finding(dataset, content):
    (dataset / "MANIFEST.json").write_bytes(content)
    assert codes(dataset) == ["F001"]


def test_a_directory_that_is_no_dataset_is_one_finding(tmp_path):
    assert codes(tmp_path / "nothing") == ["F001"]


@pytest.mark.parametrize("place", ["extra", "train/tokens/c/9", "tokenizer/vocab.json", "train/tokens/c/0/1", "x/y/z"])
def test_a_file_that_is_not_in_the_manifest_is_found(dataset, place):
    (dataset / place).parent.mkdir(parents=True, exist_ok=True)
    (dataset / place).write_bytes(b"more")
    assert [(each.code, each.place) for each in find_problems(dataset)] == [("F005", place)]


def test_a_link_to_a_folder_is_a_file_too_many(dataset):
    (dataset / "link").symlink_to("/", target_is_directory=True)
    assert [(each.code, each.place) for each in find_problems(dataset)] == [("F005", "link")]


def test_a_folder_in_place_of_a_file_is_found(dataset):
    (dataset / "mix.json").unlink()
    (dataset / "mix.json").mkdir()
    assert codes(dataset) == ["F006"]


def test_the_report_of_a_run_is_not_covered(dataset):
    (dataset / "run.json").write_text("anything")
    assert codes(dataset) == []
    (dataset / "run.json").unlink()
    assert codes(dataset) == []


def test_findings_come_in_the_same_order_every_time(dataset):
    for place in ("mix.json", "train/tokens/c/0/0", "validation/row_offsets/c/0"):
        (dataset / place).write_bytes(b"damaged")
    for place in ("b", "a"):
        (dataset / place).write_text("more")
    found = find_problems(dataset)
    assert found == find_problems(dataset)
    assert [each.place for each in found if each.code == "F005"] == ["a", "b"]


def set_item(place: Any, value: int) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[place] = value

    return change


def add_to(place: Any, value: int) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[place] += value

    return change


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("train/row_offsets", set_item(0, 1), "F020"),
        ("train/row_offsets", set_item(3, 0), "F020"),
        ("train/row_offsets", add_to(-1, -1), "F020"),
        ("train/row_offsets", add_to(-1, 10**15), "F020"),
        ("train/segment_length", set_item(5, 0), "F021"),
        ("train/segment_length", set_item(5, 2**32 - 1), "F022"),
        ("train/segment_length", set_item(5, 49), "F022"),
        ("train/row_targets", add_to(4, 1), "F024"),
        ("train/row_targets", set_item(4, 2**32 - 1), "F024"),
        ("train/segment_source", set_item(2, 3), "F025"),
        ("train/segment_source", set_item(2, 2**16 - 1), "F025"),
        ("train/segment_document", set_item(2, 2**64 - 1), "F025"),
        ("train/segment_document", set_item(-1, 10**6), "F025"),
        ("train/segment_offset", add_to(6, 1), "F044"),
        ("train/tokens", set_item((1, 0), 9999), "F041"),
        ("train/tokens", set_item((1, 5), 1), "F042"),
    ],
    ids=lambda value: value if isinstance(value, str) else "changed",  # the same in every process that collects
)
def test_a_broken_invariant_is_found_though_the_manifest_fits(dataset, name, change, code):
    rewrite(dataset, name, change)
    assert code in codes(dataset)


def test_padding_that_is_not_zero_is_found(dataset):
    def change(tokens):
        offsets = zarr.open_group(dataset, mode="r")["train"]
        ends = np.add.reduceat(offsets["segment_length"][:], offsets["row_offsets"][:-1])
        row = int(np.flatnonzero(ends < small_datasets.LENGTH)[0])
        tokens[row, -1] = 5

    rewrite(dataset, "train/tokens", change)
    assert codes(dataset) == ["F023"]


def test_an_eos_inside_a_document_is_found_with_its_row(dataset):
    rewrite(dataset, "train/tokens", set_item((2, 3), EOS))
    assert [(each.code, each.place) for each in find_problems(dataset)] == [("F042", "train row 2")]


def test_a_row_without_its_eos_breaks_the_chain_of_pieces(dataset):
    def change(tokens):
        group = zarr.open_group(dataset, mode="r")["train"]
        ends = np.cumsum(group["segment_length"][:])[group["row_offsets"][1:] - 1]
        lengths = (ends - np.append(0, ends[:-1].astype(np.int64))).astype(np.int64)
        row = int(np.flatnonzero(tokens[np.arange(len(tokens)), lengths - 1] == EOS)[0])
        tokens[row, lengths[row] - 1] = 7

    rewrite(dataset, "train/tokens", change)
    assert codes(dataset) == ["F044"]


@pytest.mark.parametrize("overflow", ["truncate", "drop"])
def test_a_document_without_its_eos_is_found(tmp_path, overflow):
    dataset = build(tmp_path, sequence={"length": 48, "overflow": overflow}, max_epochs=99)
    group = zarr.open_group(dataset, mode="r")["train"]
    first = group["segment_length"][:][group["row_offsets"][:-1]]
    row = int(np.flatnonzero(first < 48)[0])
    rewrite(dataset, "train/tokens", set_item((row, first[row] - 1), 7))
    assert codes(dataset) == ["F043"]


def test_a_document_without_its_bos_is_found(tmp_path):
    dataset = build(tmp_path, small_tokenizers.bpe_with_bos(), bos="always", budget=6000)
    group = zarr.open_group(dataset, mode="r")["train"]
    row = int(np.flatnonzero(group["segment_offset"][:][group["row_offsets"][:-1]] == 0)[0])
    rewrite(dataset, "train/tokens", set_item((row, 0), 7))
    assert codes(dataset) == ["F043"]


def test_a_later_piece_under_truncate_is_found(tmp_path):
    dataset = build(tmp_path, sequence={"length": 48, "overflow": "truncate"})
    rewrite(dataset, "train/segment_offset", add_to(0, 48))
    assert "F044" in codes(dataset)


def test_a_document_of_another_source_is_found(dataset):
    rewrite(dataset, "train/segment_source", lambda values: (values + 1) % 3)
    assert "F025" in codes(dataset)


def test_a_document_in_both_splits_is_found(dataset):
    held_out = zarr.open_group(dataset, mode="r")["validation/segment_document"][0]
    rewrite(dataset, "train/segment_document", set_item(0, held_out))
    assert "F050" in codes(dataset)


def test_swapped_documents_of_a_source_break_the_chain_of_pieces(dataset):
    """Provenance alone is wrong: only the joining of pieces can notice."""
    group = zarr.open_group(dataset, mode="r")["train"]
    offsets, sources = group["segment_offset"][:], group["segment_source"][:]
    documents = group["segment_document"][:]
    one = int(np.flatnonzero(offsets > 0)[0])
    other = int(np.flatnonzero((sources == sources[one]) & (documents != documents[one]))[0])

    def swap(values):
        values[[one, other]] = values[[other, one]]

    rewrite(dataset, "train/segment_document", swap)
    assert codes(dataset) == ["F044"]


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("train/tokens", lambda values: values.astype(np.uint32)),
        ("train/tokens", lambda values: values[:-1]),
        ("train/row_offsets", lambda values: values.astype(np.int32)),
        ("train/segment_length", lambda values: values[:-1]),
        ("validation/row_targets", lambda values: np.append(values, values)),
    ],
)
def test_an_array_of_another_shape_or_dtype_is_found(dataset, array, change):
    rewrite(dataset, array, change)
    found = find_problems(dataset)
    assert [(each.code, each.place) for each in found] == [("F010", array)]


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**15, 48]},
        {"shape": [-1, 48]},
        {"shape": "many"},
        {"shape": []},
        {"data_type": "float99"},
        {"codecs": []},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 48]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**9, 48]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [7]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": ["a", "b"]}}},
    ],
    ids=str,
)
def test_a_wrong_array_description_is_found(dataset, change):
    meta = dataset / "train/tokens/zarr.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    reseal(dataset)
    assert set(codes(dataset)) == {"F010"}


def test_a_huge_size_in_manifest_and_array_is_found_without_reading_for_ever(dataset):
    meta = dataset / "train/row_targets/zarr.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"shape": [10**18]}))
    splits = json.loads((dataset / "MANIFEST.json").read_text())["splits"]
    splits["train"]["rows"] = 10**18
    reseal(dataset, splits=splits)
    assert set(codes(dataset)) == {"F010"}


def test_a_wrong_crc_is_found_though_the_manifest_fits(dataset):
    path = dataset / "train/segment_document/c/0"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    reseal(dataset)
    found = find_problems(dataset)
    assert [(each.code, each.place) for each in found] == [("F011", "train/segment_document/c/0")]


def test_chunks_that_zarr_looks_for_elsewhere_are_found(dataset):
    meta = dataset / "train/tokens/zarr.json"
    encoding = {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}}
    meta.write_text(json.dumps(json.loads(meta.read_text()) | encoding))
    reseal(dataset)
    assert set(codes(dataset)) == {"F012"}


@pytest.mark.parametrize("group", ["", "train/"])
def test_a_group_that_zarr_cannot_open_is_found(dataset, group):
    (dataset / group / "zarr.json").write_text("no json")
    reseal(dataset)
    assert [(each.code, each.place) for each in find_problems(dataset)] == [("F010", f"{group}zarr.json")]


def test_a_chunk_that_nobody_lists_is_found(dataset):
    (dataset / "train/tokens/c/1/0").unlink()
    reseal(dataset)
    assert codes(dataset) == ["F010"]


def test_wrong_sums_in_the_manifest_are_found(dataset):
    splits = json.loads((dataset / "MANIFEST.json").read_text())["splits"]
    splits["train"]["tokens"] += 1
    splits["validation"]["targets"] -= 1
    reseal(dataset, splits=splits)
    assert codes(dataset) == ["F026", "F026"]


def edited_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "by", "expected"),
    [
        (["web", "records"], 1, {"F033"}),
        (["web", "train", "in_rows"], 1, {"F033", "F034"}),
        (["web", "train", "selected", "documents"], 1, {"F034"}),
        (["notes", "held_out", "tokens"], -1, {"F033"}),
        (["code", "files"], 1, {"F031"}),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_a_wrong_number_in_the_ledger_is_found(dataset, keys, by, expected):
    def change(ledger):
        node = ledger["sources"]
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] += by

    edited_json(dataset / "ledger.json", change)
    reseal(dataset)
    assert set(codes(dataset)) == expected


def test_tokens_moved_between_sources_are_found_though_all_sums_close(dataset):
    def change(ledger):
        for name, by in (("web", 1), ("code", -1)):
            for node in (ledger["sources"][name]["train"]["selected"], ledger["sources"][name]["documents"]):
                node["tokens"] += by
            ledger["sources"][name]["selected"]["tokens"] += by
            ledger["sources"][name]["train"]["in_rows"] += by

    edited_json(dataset / "ledger.json", change)
    reseal(dataset)
    assert set(codes(dataset)) == {"F034"}


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"sources": {}, "splits": {}}'])
def test_a_ledger_that_cannot_be_read_is_found(dataset, content):
    (dataset / "ledger.json").write_text(content)
    reseal(dataset)
    assert codes(dataset) == ["F032"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"output": 3}', "\0"])
def test_a_mix_that_cannot_be_read_is_found(dataset, content):
    (dataset / "mix.json").write_text(content)
    reseal(dataset)
    assert codes(dataset) == ["F030"]


def test_a_mix_of_another_dataset_is_found(dataset):
    edited_json(dataset / "mix.json", lambda mix: mix["sequence"].update(length=64))
    reseal(dataset)
    assert codes(dataset) == ["F030"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 nothing PAR1", b"text"])
def test_a_list_of_files_that_cannot_be_read_is_found(dataset, content):
    (dataset / "files.parquet").write_bytes(content)
    reseal(dataset)
    assert codes(dataset) == ["F031"]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["path"]),
        lambda table: table.slice(0, 2),
        lambda table: table.slice(0, 0),
        lambda table: table.set_column(0, "source", [["other"] * table.num_rows]),
        lambda table: table.take([2, 1, 0]),
    ],
)
def test_a_list_of_other_files_is_found(dataset, change):
    path = dataset / "files.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    reseal(dataset)
    assert "F031" in codes(dataset)


@pytest.mark.parametrize("content", ["", '{"source": "web"}\n{"source": "web"}\n', "broken\n", '{"other": 1}\n', "3\n"])
def test_a_quarantine_that_does_not_hold_what_the_ledger_says_is_found(dataset, content):
    (dataset / "quarantine.jsonl").write_text(content)
    reseal(dataset)
    assert codes(dataset) == ["F035"]


@pytest.mark.parametrize("content", ["", "{}", "no json", '{"model": null}'])
def test_a_tokenizer_that_cannot_be_read_is_found(dataset, content):
    (dataset / "tokenizer/tokenizer.json").write_text(content)
    reseal(dataset)
    assert codes(dataset) == ["F040"]


def test_another_tokenizer_is_found(dataset):
    shutil.rmtree(dataset / "tokenizer")
    small_tokenizers.save(small_tokenizers.bpe_with_bos(), dataset / "tokenizer", eos_token=small_tokenizers.EOT)
    reseal(dataset)
    assert set(codes(dataset)) == {"F040"}


@pytest.mark.parametrize("key", ["digest", "max_id", "eos_id"])
def test_a_manifest_that_says_other_things_of_the_tokenizer_is_found(dataset, key):
    tokenizer = json.loads((dataset / "MANIFEST.json").read_text())["tokenizer"]
    reseal(dataset, tokenizer=tokenizer | {key: "0" if key == "digest" else 5})
    assert "F040" in codes(dataset)


def test_a_problem_in_many_rows_is_told_once_with_the_first_row(dataset):
    rewrite(dataset, "train/row_targets", lambda values: values + 1)
    found = [each for each in find_problems(dataset) if each.code == "F024"]
    num_rows = zarr.open_group(dataset, mode="r")["train/tokens"].shape[0]
    assert len(found) == 1
    assert found[0].place == "train row 0"
    assert f"({num_rows} rows in all)" in found[0].message


def test_blocks_of_one_row_find_the_same(dataset, monkeypatch):
    for name, change in (("row_targets", add_to(4, 1)), ("segment_source", set_item(2, 3))):
        rewrite(dataset, f"train/{name}", change)
    at_once = find_problems(dataset)
    monkeypatch.setattr("llmt_prep.verify.rows.TOKENS_AT_ONCE", 1)
    assert find_problems(dataset) == at_once


def test_a_sound_dataset_is_told_with_its_digest(sound):
    assert as_text(sound, []).startswith(f"{sound}: sound; digest ")


def test_text_and_json_hold_every_finding(dataset):
    (dataset / "mix.json").write_text("damaged")
    (dataset / "evil\x1b[31m").write_text("more")
    found = find_problems(dataset)
    text, data = as_text(dataset, found), json.loads(to_json(found))
    assert [each["code"] for each in data["findings"]] == ["F003", "F005"]
    assert data["is_sound"] is False
    assert all(each.code in text and MEANINGS[each.code] in text for each in found)
    assert "\x1b" not in text + to_json(found)
    assert json.loads(to_json([])) == {"is_sound": True, "findings": []}


def test_every_code_has_one_meaning():
    assert len(set(MEANINGS.values())) == len(MEANINGS)
