"""Byte-pair encoding of one string against the `tokenizers` library, and the merges that make a string one token."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from llmt_prep.bpe import encode, join

pieces = st.text("abc", min_size=1, max_size=10)


@st.composite
def merge_lists(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Merges of tokens that exist: characters, or what earlier merges made."""
    tokens, pairs = ["a", "b", "c"], []
    for _ in range(draw(st.integers(0, 8))):
        pair = (draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens)))
        if pair not in pairs:
            pairs.append(pair)
            tokens.append("".join(pair))
    return pairs


def reference(pairs: list[tuple[str, str]], piece: str) -> list[str]:
    tokens = dict.fromkeys(["a", "b", "c", *("".join(pair) for pair in pairs)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return Tokenizer(models.BPE(vocabulary, pairs)).encode(piece).tokens


@given(merge_lists(), pieces)
def test_a_string_is_encoded_as_the_library_does(pairs, piece):
    assert encode(list(piece), {pair: rank for rank, pair in enumerate(pairs)}) == reference(pairs, piece)


@given(merge_lists(), st.lists(pieces, min_size=1, max_size=4))
def test_every_string_that_was_joined_is_one_token_in_the_end(pairs, wanted):
    merges = {pair: rank for rank, pair in enumerate(pairs)}
    for piece in wanted:
        join(piece, merges)
    assert [reference(list(merges), piece) for piece in wanted] == [[piece] for piece in wanted]


@given(merge_lists(), pieces, pieces)
def test_a_text_without_what_was_made_is_encoded_as_before(pairs, wanted, text):
    merges = {pair: rank for rank, pair in enumerate(pairs)}
    made = join(wanted, merges)
    if not any(token in text for token in made):
        assert reference(list(merges), text) == reference(pairs, text)


@given(merge_lists(), pieces)
def test_old_merges_keep_their_ranks(pairs, piece):
    merges = {pair: rank for rank, pair in enumerate(pairs)}
    join(piece, merges)
    assert list(merges)[: len(pairs)] == pairs
    assert list(merges.values()) == list(range(len(merges)))
