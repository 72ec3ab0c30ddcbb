"""One row as people see it: the right text from the right line, and nothing that steers a terminal."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import small_datasets
import small_tokenizers
from tokenizers import Tokenizer, decoders, models

from llmt_prep.inspection import RowView, inspect_row, render, token_runs
from llmt_prep.report import as_json
from llmt_shared.dataset import Dataset, open_dataset
from llmt_shared.errors import ConfigError, FormatError

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return open_dataset(small_datasets.build(folder))


@pytest.fixture(scope="module")
def views(dataset: Dataset) -> list[RowView]:
    return [inspect_row(dataset, "train", row) for row in range(len(dataset.train))]


def pieces_of(tokenizer: Tokenizer, ids: list[int], control: frozenset[int] = frozenset()) -> list[str]:
    return [run.text for run in token_runs(tokenizer, ids, [True] * len(ids), control)]


def original(folder: Path, place: str) -> str:
    """The text that a place names, found as a reader would: lines from 1, rows of Parquet from 0."""
    if match := re.fullmatch(r"(.*) row (\d+)", place):
        return pq.read_table(match[1])["text"][int(match[2])].as_py()
    path, line = place.rsplit(":", 1)
    text = Path(path).read_text().split("\n")[int(line) - 1]
    return json.loads(text)["text"] if path.endswith(".jsonl") else text


def test_every_segment_is_a_piece_of_the_text_that_its_place_names(folder, views):
    tokenizer = small_tokenizers.byte_level_bpe()
    tokenizer.encode_special_tokens = True
    for segment in (segment for view in views for segment in view.segments):
        ids = [*tokenizer.encode(original(folder, segment.place)).ids, 0]
        shown = [index for run in segment.tokens for index in run.ids]
        assert shown == ids[segment.offset : segment.offset + segment.length]


def test_whole_documents_are_shown_as_their_text(folder, views):
    whole = [
        segment for view in views for segment in view.segments if segment.offset == 0 and segment.tokens[-1].is_control
    ]
    assert {segment.source for segment in whole} == {"web", "code", "notes"}
    for segment in whole:
        assert "".join(run.text for run in segment.tokens[:-1]) == original(folder, segment.place)


def test_counts_add_up(dataset, views):
    for row, view in enumerate(views):
        assert sum(segment.length for segment in view.segments) + view.padding == view.length == small_datasets.LENGTH
        assert view.targets == int(dataset.train.row_targets[row : row + 1][0])
        assert view.targets == sum(run.targets for segment in view.segments for run in segment.tokens)
        assert [segment.number for segment in view.segments] == list(range(1, len(view.segments) + 1))


def test_the_first_token_of_a_segment_is_no_target(views):
    for segment in (segment for view in views for segment in view.segments):
        assert segment.length - sum(run.targets for run in segment.tokens) == 1
        assert segment.tokens[0].targets == len(segment.tokens[0].ids) - 1


def test_no_control_sequence_of_a_document_reaches_the_terminal(views):
    """A document holds escape codes, C1 controls, a bell and bidirectional controls."""
    nasty = [view for view in views if "\x1b" in "".join(r.text for s in view.segments for r in s.tokens)]
    assert nasty
    for view in nasty:
        for text in (render(view, False), ANSI.sub("", render(view, True)), as_json(view)):
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
        assert "\\x1b[31m" in render(view, False)


def test_a_string_that_looks_like_a_control_token_is_told_from_one(views):
    texts = [render(view, False) for view in views]
    assert any(re.search(r"(?<!⟦)<\|endoftext\|>", text) for text in texts)
    assert any("⟦<|endoftext|>⟧" in text for text in texts)


def test_colours_mark_targets_others_and_control_tokens(views):
    view = next(view for view in views if view.segments[0].tokens[-1].is_control)
    shown = render(view, True).split("\n")[2]
    assert shown.startswith("\x1b[2m")
    assert re.search(r"\x1b\[(32|92);7m<\|endoftext\|>\x1b\[0m$", shown)


def test_text_without_colour_holds_no_escape(views):
    assert "\x1b" not in "".join(render(view, False) for view in views)


def test_segments_are_parted_by_rules_that_say_where_from(views):
    view = next(view for view in views if len(view.segments) > 1)
    rules = [line for line in render(view, False).split("\n") if line.startswith("── ")]
    assert len(rules) == len(view.segments) + 1
    for segment, rule in zip(view.segments, rules, strict=False):
        assert f" {segment.number}  {segment.source}  {segment.place}  offset {segment.offset}  " in rule


def test_padding_is_counted_at_the_end(views):
    view = next(view for view in views if view.padding)
    assert f"── {view.padding} tokens of padding" in render(view, False)


@pytest.mark.parametrize("row", [-1, 10**9])
def test_a_row_out_of_range_is_told_with_the_range(dataset, row):
    with pytest.raises(ConfigError, match=rf"row {row}: .* wanted 0 \.\. {len(dataset.train) - 1}$"):
        inspect_row(dataset, "train", row)


def test_an_unknown_split_is_told_with_those_there_are(dataset):
    with pytest.raises(ConfigError, match="it has train, validation"):
        inspect_row(dataset, "test", 0)


def test_validation_can_be_inspected(dataset):
    assert inspect_row(dataset, "validation", 0).split == "validation"


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "files.parquet", "mix.json"])
def test_a_damaged_companion_is_a_format_error(dataset, tmp_path, name):
    path = small_datasets.copy(dataset.path, tmp_path / "data")
    (path / name).write_text("{}")
    small_datasets.reseal(path)
    with pytest.raises(FormatError, match=re.escape(name)):
        inspect_row(open_dataset(path), "train", 0)


def test_a_character_of_several_tokens_is_one_run():
    tokenizer = small_tokenizers.byte_level_bpe()
    ids = tokenizer.encode("a🙂é").ids
    assert pieces_of(tokenizer, ids) == ["a", "🙂", "é"]
    assert len(ids) > 3


def test_a_cut_character_is_shown_as_bytes():
    tokenizer = small_tokenizers.byte_level_bpe()
    ids = tokenizer.encode("🙂").ids
    assert "".join(pieces_of(tokenizer, ids[1:])) == "\\x9f\\x99\\x82"
    assert "".join(pieces_of(tokenizer, ids[:-1])) == "\\xf0\\x9f\\x99"


def test_a_replacement_character_in_a_text_is_itself():
    tokenizer = small_tokenizers.byte_level_bpe()
    assert "".join(pieces_of(tokenizer, tokenizer.encode("a\ufffdb").ids)) == "a\ufffdb"


def test_spaces_of_a_sentencepiece_tokenizer_are_kept():
    tokenizer = small_tokenizers.unigram()
    text = "he quick brown fox jumps over"
    assert "".join(pieces_of(tokenizer, tokenizer.encode(text).ids)) == text


def test_bytes_of_a_tokenizer_with_byte_fallback_are_joined():
    tokenizer = Tokenizer(models.BPE({"a": 0, "<0xC3>": 1, "<0xA9>": 2}, []))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert pieces_of(tokenizer, [0, 1, 2, 0]) == ["a", "é", "a"]
    assert "".join(pieces_of(tokenizer, [2, 0])) == "\\xa9a"


def test_an_id_that_the_tokenizer_does_not_know_is_shown_as_a_number():
    assert pieces_of(small_tokenizers.byte_level_bpe(), [9999]) == ["<9999>"]


def test_a_control_token_is_shown_by_its_name_and_ends_a_cut_character():
    tokenizer = small_tokenizers.byte_level_bpe()
    ids = [*tokenizer.encode("🙂").ids[:2], 0]
    assert pieces_of(tokenizer, ids, frozenset([0])) == ["\\xf0\\x9f", small_tokenizers.EOT]


def test_a_long_row_of_bytes_that_are_no_text_is_shown():
    tokenizer = small_tokenizers.byte_level_bpe()
    last_byte = tokenizer.encode("🙂").ids[-1]
    assert "".join(pieces_of(tokenizer, [last_byte] * 100)) == "\\x82" * 100
