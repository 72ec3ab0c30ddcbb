"""Which part of a text a token stands for: against the offsets of `tokenizers` itself."""

from collections import Counter

import numpy as np
import pytest
import small_tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from llmt_prep.chat.offsets import encoding_with_extents, places_in, spelling_of
from llmt_prep.engines import fast_engine
from llmt_prep.tokenizer import load_tokenizer

ODD = ["<|im_start|>", " a <|im_start|>b", "日本語 é", ""]
TEXTS = st.lists(st.text(max_size=30) | st.sampled_from(ODD), max_size=5)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    stripping = small_tokenizers.byte_level_bpe()
    stripping.add_special_tokens([AddedToken("<|im_start|>", lstrip=True, rstrip=True)])
    folding = small_tokenizers.byte_level_bpe()
    folding.normalizer = normalizers.NFKC()
    found = {name: getattr(small_tokenizers, name)() for name in ("byte_level_bpe", "bpe_with_bos", "unigram")}
    found |= {"stripping": stripping, "folding": folding}
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: load_tokenizer(str(small_tokenizers.save(each, folder / name))) for name, each in found.items()}


def reference_offsets(tokenizer, text):
    backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    backend.encode_special_tokens = False
    backend.post_processor = None
    found = backend.encode(text, add_special_tokens=False)
    return found.ids, found.offsets


def in_characters(text, begin, end):
    """Characters that a range of bytes touches."""
    borders = np.cumsum([0, *(len(character.encode()) for character in text)])
    return int(np.searchsorted(borders, begin, "right")) - 1, int(np.searchsorted(borders, end, "left"))


@pytest.mark.parametrize("name", ["byte_level_bpe", "bpe_with_bos", "unigram", "stripping", "folding"])
@given(texts=TEXTS)
def test_extents_are_the_offsets_of_the_reference(tokenizers, name, texts):
    encoding = encoding_with_extents(tokenizers[name])(texts, None, Counter())
    assert not encoding.reasons
    extents, token = encoding.extents, 0
    for number, text in enumerate(texts):
        ids, offsets = reference_offsets(tokenizers[name], text)
        mine = slice(token, token + int(encoding.encoded.lengths[number]))
        assert encoding.encoded.ids[mine].tolist() == ids
        places = np.stack([extents.begin[mine], extents.end[mine]], axis=1) - extents.text[number]
        if extents.is_bytes:
            places = [in_characters(text, *place) for place in places]
        assert [tuple(map(int, place)) for place in places] == offsets
        token = mine.stop
    assert token == len(encoding.encoded.ids)


def test_a_tokenizer_that_spells_texts_needs_no_offsets(tokenizers):
    assert spelling_of(tokenizers["byte_level_bpe"]) is not None
    assert encoding_with_extents(tokenizers["byte_level_bpe"])(["a <|im_start|>é"], None, Counter()).extents.is_bytes


def test_a_token_that_swallows_spaces_is_noticed(tokenizers):
    assert not encoding_with_extents(tokenizers["stripping"])(["a  <|im_start|> b"], None, Counter()).extents.is_bytes


@pytest.mark.parametrize("name", ["unigram", "folding"])
def test_a_tokenizer_that_changes_texts_is_asked_for_offsets(tokenizers, name):
    assert spelling_of(tokenizers[name]) is None


@given(texts=TEXTS)
def test_extents_do_not_depend_on_the_engine(tokenizers, texts):
    tokenizer = tokenizers["byte_level_bpe"]
    encode = encoding_with_extents(tokenizer)
    slow, fast = encode(texts, None, Counter()), encode(texts, fast_engine(tokenizer, keep_control=True), Counter())
    np.testing.assert_array_equal(slow.encoded.ids, fast.encoded.ids)
    np.testing.assert_array_equal(slow.extents.begin, fast.extents.begin)
    np.testing.assert_array_equal(slow.extents.end, fast.extents.end)


@given(st.text(max_size=20), st.data())
def test_places_of_characters_in_bytes(text, data):
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    assert places_in(text, places, True) == [len(text[:place].encode()) for place in places]
    assert places_in(text, places, False) == places
