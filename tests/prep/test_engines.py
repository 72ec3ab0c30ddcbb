"""Both engines give what bare `tokenizers` gives, for texts of any length, with control strings kept or not."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import EOT, bpe_with_bos, byte_level_bpe, save, unigram, word_piece
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from llmt_prep import engines
from llmt_prep.edge_texts import edge_texts
from llmt_prep.engines import Encoded, EngineRefusal, fast_engine, reference_engine
from llmt_prep.tokenizer import LoadedTokenizer, load_tokenizer

BUILDERS = {"bpe": byte_level_bpe, "bpe with bos": bpe_with_bos, "word piece": word_piece, "unigram": unigram}
EDGES = edge_texts((EOT, "<|im_start|>"))
edge_lists = st.lists(st.sampled_from(EDGES), max_size=8)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: load_tokenizer(str(save(build(), folder / name))) for name, build in BUILDERS.items()}


def bare_ids(build: str, text: str, *, keep: bool) -> list[int]:
    tokenizer: Tokenizer = BUILDERS[build]()
    tokenizer.encode_special_tokens = not keep
    return tokenizer.encode(text, add_special_tokens=False).ids


def parted(encoded: Encoded) -> list[list[int]]:
    return [part.tolist() for part in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("build", BUILDERS)
@given(texts=edge_lists.filter(bool))
def test_the_reference_is_bare_tokenizers(tokenizers, build, keep, texts):
    encoded = reference_engine(tokenizers[build], keep_control=keep).encode(texts)
    assert parted(encoded) == [bare_ids(build, text, keep=keep) for text in texts]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("build", ["bpe", "bpe with bos"])
def test_the_fast_engine_equals_the_reference_on_every_edge_text(tokenizers, build, keep):
    fast = fast_engine(tokenizers[build], keep_control=keep).encode(EDGES)
    reference = reference_engine(tokenizers[build], keep_control=keep).encode(EDGES)
    assert np.array_equal(fast.lengths, reference.lengths)
    assert np.array_equal(fast.ids, reference.ids)


def test_an_engine_is_named_with_its_version(tokenizers):
    assert reference_engine(tokenizers["bpe"], keep_control=False).name.startswith("tokenizers 0.")
    assert fast_engine(tokenizers["bpe"], keep_control=False).name.startswith("fastokens 0.")


def test_no_texts_have_no_ids(tokenizers):
    for engine in (reference_engine, fast_engine):
        encoded = engine(tokenizers["bpe"], keep_control=False).encode([])
        assert (len(encoded.ids), len(encoded.lengths)) == (0, 0)


def test_a_tokenizer_that_the_fast_engine_does_not_support_is_refused_with_its_reason(tokenizers):
    with pytest.raises(EngineRefusal, match=r"does not support this tokenizer: .*Metaspace"):
        fast_engine(tokenizers["unigram"], keep_control=False)


def test_dropout_is_off_in_the_fast_engine(tokenizers):
    """Else one text has other tokens on every run."""
    bpe = tokenizers["bpe"]
    content = json.loads(bpe.files["tokenizer.json"])
    content["model"]["dropout"] = 0.9
    wild = dataclasses.replace(bpe, files={"tokenizer.json": json.dumps(content).encode()})
    text = ["The quick brown fox jumps over the lazy dog"] * 8
    assert parted(fast_engine(wild, keep_control=False).encode(text)) == parted(
        reference_engine(bpe, keep_control=False).encode(text)
    )


# Long texts in pieces


def normalized_bpe() -> Tokenizer:
    tokenizer = byte_level_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return tokenizer


def prefixed_bpe() -> Tokenizer:
    """As RoBERTa: a space is put before every text."""
    tokenizer = byte_level_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def lines_bpe() -> Tokenizer:
    """Its words are whole lines, so that no place between words is safe."""
    tokenizer = byte_level_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def one_word_bpe() -> Tokenizer:
    """As Llama 2: spaces are replaced before, and the whole text is one word."""
    tokenizer = byte_level_bpe()
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


LONG = {**BUILDERS, "nfc": normalized_bpe, "prefix": prefixed_bpe, "lines": lines_bpe, "one word": one_word_bpe}
long_text = st.lists(
    st.sampled_from([*EDGES[:120], " word", " another", "e", "\u0301", ", and", ". ", "日本。", "x1,000", f" {EOT} b"]),
    min_size=5,
    max_size=60,
).map("".join)


@pytest.fixture(scope="module")
def long_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedTokenizer]:
    folder = tmp_path_factory.mktemp("long")
    return {name: load_tokenizer(str(save(build(), folder / name))) for name, build in LONG.items()}


@pytest.mark.parametrize("name", LONG)
@given(texts=st.lists(long_text, min_size=1, max_size=3), piece=st.integers(1, 40))
def test_pieces_of_a_long_text_give_the_tokens_of_the_whole(long_tokenizers, name, texts, piece):
    whole = reference_engine(long_tokenizers[name], keep_control=False).encode(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "PIECE_CHARACTERS", piece)
        pieces = reference_engine(long_tokenizers[name], keep_control=False).encode(texts)
    assert parted(pieces) == parted(whole)


def test_a_megabyte_is_cut_and_has_the_tokens_of_the_whole(tokenizers, monkeypatch):
    source = "".join(path.read_text() for path in sorted(Path(engines.__file__).parent.glob("*.py")))
    text = (source * 8)[:1_000_000]
    whole = [engine(tokenizers["bpe"], keep_control=False).encode([text]) for engine in (reference_engine, fast_engine)]
    monkeypatch.setattr(engines, "PIECE_CHARACTERS", 10_000)
    for engine, uncut in zip((reference_engine, fast_engine), whole, strict=True):
        assert np.array_equal(engine(tokenizers["bpe"], keep_control=False).encode([text]).ids, uncut.ids)
