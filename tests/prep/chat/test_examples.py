"""The example mixes and the commands, as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_chats

from llmt_shared.dataset import open_dataset

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return small_chats.save_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=None)


def run(*arguments, code=0):
    command = [sys.executable, "-m", "llmt_prep", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "NO_COLOR": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tokenizer_dir):
    def pack(name):
        out = tmp_path_factory.mktemp(name) / "data"
        said = ("--mix", f"configs/mix/{name}.yaml", f"tokenizer={tokenizer_dir}", f"output={out}", "--workers", "1")
        return out, run("pack", *said).stderr

    return {name: pack(name) for name in ("sft", "preference")}


@pytest.mark.parametrize("name", ["sft", "preference"])
def test_an_example_mix_is_packed_whole_and_sound(packed, name):
    out, _ = packed[name]
    run("verify", out)
    books = json.loads((out / "ledger.json").read_text())["sources"]
    (of_source,) = books.values()
    assert of_source["quarantined"] == 0
    assert of_source["records"] == {"sft": 110, "preference": 307}[name]
    assert open_dataset(out).manifest.splits["train"].spans > 0


def test_packing_tells_what_the_template_drops(packed):
    _, told = packed["sft"]
    assert "chat template chatml: thinking: it drops the thinking" in told


def test_stats_tell_of_targets_and_pairs(packed):
    out, _ = packed["preference"]
    text = run("stats", out).stdout
    assert "of the tokens are targets" in text
    assert "pairs, both sides of each in one row" in text
    trained = json.loads(run("stats", out, "--json").stdout)["splits"]["train"]["trained"]
    assert trained["ends_turn"] == 1
    assert trained["pairs"]["pairs"] == open_dataset(out).manifest.splits["train"].pairs


def test_a_row_of_pairs_names_its_sides(packed):
    out, _ = packed["preference"]
    assert "1  chosen  harmless" in run("inspect", out, "--row", 0).stdout


def test_a_raw_record_is_shown_in_three_steps(packed):
    out, _ = packed["preference"]
    text = run("inspect", out, "--raw", "harmless:3").stdout
    assert "hh-rlhf-harmless.jsonl:4" in text
    for step in ('"chosen": "', "chosen text:", "chosen tokens:", "rejected text:", "rejected tokens:"):
        assert step in text


def test_a_raw_record_has_the_tokens_of_the_dataset(packed):
    out, _ = packed["sft"]
    dataset, found = open_dataset(out), {}
    for number in range(len(dataset.train)):
        row, place = dataset.train[number], 0
        for record, length in zip(row.segments.document.tolist(), row.segments.length.tolist(), strict=True):
            found[record] = row.tokens[place : place + length].tolist()
            place += length
    record = min(found)
    (text,) = json.loads(run("inspect", out, "--raw", f"tasks:{record}", "--json").stdout)["texts"]
    assert [token for each in text["tokens"] for token in each["ids"]] == found[record]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "wanted either --row N or --raw"),
        (("--raw", "other:1"), "wanted SOURCE:RECORD, such as tasks:0"),
        (("--raw", "tasks:110"), "source tasks has 110 records; wanted 0 .. 109"),
        (("--row", "0", "--raw", "tasks:1"), "wanted either --row N or --raw"),
    ],
)
def test_inspect_says_what_it_wants(packed, arguments, message):
    assert message in run("inspect", packed["sft"][0], *arguments, code=2).stderr


def test_a_tokenizer_is_extended(tmp_path, tokenizer_dir):
    (tmp_path / "words.txt").write_text(" flabbergasted\n\n quokka\n")
    said = ("--tokens-file", tmp_path / "words.txt", "--pad-token", "<|pad|>", "--out", tmp_path / "wider")
    report = json.loads(run("tokenizer", "extend", tokenizer_dir, *said, "--json").stdout)
    assert report["added"] == [" flabbergasted", " quokka"]
    assert report["special"] == ["<|pad|>"]
    assert json.loads((tmp_path / "wider" / "tokenizer_config.json").read_text())["pad_token"] == "<|pad|>"
    assert "exists already" in run("tokenizer", "extend", tokenizer_dir, *said, code=2).stderr
