"""The dataset's ids must mean the same to the model."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from llmt_shared.errors import ConfigError, FormatError
from llmt_train.model.match import check_max_id, check_tokenizers, model_token_ids, read_token_ids

DATASET = {"a": 0, "b": 1, "</s>": 2}


def test_equal_maps_match() -> None:
    check_tokenizers(DATASET, dict(DATASET), "model")


def test_tokens_of_one_side_only_are_fine() -> None:
    check_tokenizers(DATASET, {"a": 0, "b": 1}, "model")
    check_tokenizers({"a": 0}, DATASET, "model")


def test_a_token_with_another_id_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'b' is 1 in the dataset, 2 in the model's"):
        check_tokenizers(DATASET, {"a": 0, "b": 2}, "model")


def test_an_id_with_another_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'b' is 1 in the dataset, where the model's has 'c'"):
        check_tokenizers(DATASET, {"a": 0, "c": 1, "</s>": 2}, "model")


def test_many_differences_are_counted_and_three_are_shown() -> None:
    shifted = {f"t{index}": index + 1 for index in range(10)}
    with pytest.raises(ConfigError, match="10 tokens differ") as caught:
        check_tokenizers({f"t{index}": index for index in range(10)}, shifted, "model")
    assert str(caught.value).count("in the dataset") == 3


def test_the_largest_id_needs_an_embedding() -> None:
    check_max_id(9, 10, "model")
    with pytest.raises(ConfigError, match="vocab_size >= 11"):
        check_max_id(10, 10, "model")


def test_the_map_equals_that_of_tokenizers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.add_tokens(["new", "newer"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_token_ids(tmp_path / "tokenizer.json") == tokenizer.get_vocab(with_added_tokens=True)


def test_a_unigram_vocabulary_is_read_by_place(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("x", -1.0), ("y", -2.0)], 0, False))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_token_ids(tmp_path / "tokenizer.json") == {"<unk>": 0, "x": 1, "y": 2}


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"model": {"vocab": 3}}', b"\xff"])
def test_what_is_no_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"not a tokenizer\.json"):
        read_token_ids(tmp_path / "tokenizer.json")


def test_a_model_folder_without_tokenizer_has_no_map(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert model_token_ids(str(tmp_path)) is None


def test_a_folder_may_be_in_the_users_home(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert model_token_ids("~/model") is None


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        model_token_ids(str(tmp_path / "no" / "such" / "folder"))
