"""A long text is cut only where its tokenizer shows that no word crosses."""

import pytest
from small_tokenizers import EOT, byte_level_bpe, unigram, word_piece
from tokenizers import AddedToken, normalizers, pre_tokenizers

from llmt_prep.cutting import find_cuts


def test_cuts_lie_between_words_and_about_the_wanted_size_apart():
    text = "some words of a text, " * 100
    cuts = find_cuts(text, 100, byte_level_bpe())
    assert len(cuts) >= 20
    assert all(text[cut] in " ," and text[cut - 1].isalnum() for cut in cuts)
    assert all(100 <= after - before < 120 for before, after in zip([0, *cuts], cuts, strict=False))


def test_a_short_text_is_not_cut():
    assert find_cuts("two words", 100, byte_level_bpe()) == []


@pytest.mark.parametrize("build", [byte_level_bpe, word_piece])
def test_text_without_spaces_is_cut_at_its_marks(build):
    text = "日本語、" * 100
    assert {text[cut] for cut in find_cuts(text, 50, build())} == {"、"}


def test_one_long_word_stays_whole():
    assert find_cuts("x" * 10_000, 100, byte_level_bpe()) == []


def test_a_tokenizer_without_words_gets_whole_texts():
    tokenizer = byte_level_bpe()
    tokenizer.pre_tokenizer = None
    assert find_cuts("a b " * 100, 10, tokenizer) == []


def test_words_that_reach_over_spaces_are_not_cut():
    tokenizer = unigram()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    assert find_cuts("a b " * 100, 10, tokenizer) == []


def test_an_added_token_that_reaches_over_a_space_is_not_cut():
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken("tool call", special=False)])
    text = "tool call" * 100
    assert find_cuts(text, 10, tokenizer) == []


def test_a_normalizer_that_strips_is_noticed():
    tokenizer = byte_level_bpe()
    tokenizer.normalizer = normalizers.Strip()
    cuts = find_cuts("word word, " * 50, 20, tokenizer)
    assert cuts
    assert all(("word word, " * 50)[cut] == "," for cut in cuts)


def test_control_strings_do_not_keep_a_text_whole():
    text = f"before {EOT} behind " * 100
    assert len(find_cuts(text, 100, byte_level_bpe())) > 10
