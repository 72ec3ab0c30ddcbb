"""A fast engine that differs from the reference is noticed, named and not believed again."""

import json

import numpy as np
import pytest
from small_tokenizers import EOT, byte_level_bpe, save, unigram

from llmt_prep import held, tokenization
from llmt_prep.choice import choose_engine
from llmt_prep.documents import Reading, split_into_units
from llmt_prep.edge_texts import edge_texts
from llmt_prep.engines import Encoded, Engine, fast_engine, reference_engine
from llmt_prep.guard import (
    LONGEST,
    SAMPLED_SHARE,
    EngineDiffers,
    chosen_ids,
    distrust,
    first_difference,
    inexact_engines,
    sampled,
)
from llmt_prep.held import Shelved, hold
from llmt_prep.tokenization import TextSettings, tokenize_unit
from llmt_prep.tokenizer import load_tokenizer
from llmt_shared.errors import ConfigError


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(str(save(byte_level_bpe(), tmp_path / "tokenizer", eos_token=EOT)))


def wrong_on(word: str, right: Engine) -> Engine:
    """An engine that is right but for texts that hold a word: of those it gives one more token."""

    def encode(texts):
        parts = [right.encode([text]) for text in texts]
        ids = [np.append(part.ids, 7) if word in text else part.ids for text, part in zip(texts, parts, strict=True)]
        return Encoded(
            np.concatenate([np.empty(0, np.uint32), *ids]).astype(np.uint32), np.array([len(each) for each in ids])
        )

    return Engine("fastokens 0", encode)


def test_engines_that_agree_have_no_difference(tokenizer):
    reference = reference_engine(tokenizer, keep_control=False)
    texts = ["one", "", "three"]
    found = [reference.encode([text]).ids for text in texts]
    assert first_difference(texts, found, reference.encode) is None
    assert first_difference([], [], reference.encode) is None


def test_the_first_difference_says_which_text_and_token(tokenizer):
    reference = reference_engine(tokenizer, keep_control=False)
    texts = ["one", "two", "three"]
    found = [reference.encode([text]).ids for text in texts]
    wanted = found[1].copy()
    found[1] = np.append(found[1], 9).astype(np.uint32)
    assert first_difference(texts, found, reference.encode) == (1, f"token {len(wanted)} is 9, wanted none")
    found[1] = wanted.copy()
    found[1][0] += 1
    assert first_difference(texts, found, reference.encode) == (1, f"token 0 is {wanted[0] + 1}, wanted {wanted[0]}")


def test_a_text_that_only_the_reference_refuses_is_a_difference(tokenizer):
    """Else one engine would store it and the other put it into quarantine."""

    def refuse(texts):
        if "two" in texts:
            raise ValueError("no two")
        return reference_engine(tokenizer, keep_control=False).encode(texts)

    found = [refuse([text]).ids for text in ("one", "one", "three")]
    number, how = first_difference(["one", "two", "three"], found, refuse)
    assert (number, how.rpartition("the reference")[2]) == (1, " refuses it: no two")


def test_of_a_long_text_the_beginning_is_compared(tokenizer):
    reference = reference_engine(tokenizer, keep_control=False)
    texts = ["short", "long " * LONGEST]
    compared, ids = chosen_ids(texts, reference.encode(texts), [0, 1], reference.encode)
    assert [len(text) for text in compared] == [5, LONGEST]
    assert first_difference(compared, ids, reference.encode) is None


def test_the_sample_is_a_share_of_all_texts():
    hashes = np.random.default_rng(0).integers(0, 2**64, 1_000_000, np.uint64)
    assert sampled(hashes).mean() == pytest.approx(SAMPLED_SHARE, rel=0.2)


def test_edge_texts_are_the_same_on_every_call_and_hold_the_control_tokens():
    texts = edge_texts((EOT, "<s>"))
    edge_texts.cache_clear()
    assert edge_texts((EOT, "<s>")) == texts
    assert len(texts) > 1000
    assert sum(EOT in text for text in texts) > 20


# In a unit


def unit_of(tmp_path, texts):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return split_into_units(path, "auto", 1 << 30)[0]


def test_a_difference_in_the_first_documents_names_the_line_and_keeps_the_unit_away(tmp_path, tokenizer):
    wrong = wrong_on("bad", reference_engine(tokenizer, keep_control=False))
    unit = unit_of(tmp_path, ["good", "fine", "a bad one"])
    with pytest.raises(EngineDiffers, match=r"texts\.jsonl:3: fastokens 0 does not give .*`engine: auto`") as raised:
        tokenize_unit(unit, Reading(), tokenizer, TextSettings(), tmp_path / "u", fast=wrong, begins_source=True)
    assert raised.value.engine == "fastokens 0"
    assert not (tmp_path / "u").exists()


def test_a_difference_in_the_sample_is_noticed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization, "sampled", lambda hashes: np.arange(len(hashes)) == 1)
    wrong = wrong_on("bad", reference_engine(tokenizer, keep_control=False))
    with pytest.raises(EngineDiffers, match=r"jsonl:2"):
        tokenize_unit(
            unit_of(tmp_path, ["bad", "bad", "bad"]), Reading(), tokenizer, TextSettings(), tmp_path / "u", fast=wrong
        )


def test_a_unit_counts_what_was_compared(tmp_path, tokenizer):
    fast = fast_engine(tokenizer, keep_control=False)
    unit = unit_of(tmp_path, ["one", "two", "three"])
    meta = tokenize_unit(unit, Reading(), tokenizer, TextSettings(), tmp_path / "u", fast=fast, begins_source=True)
    assert (meta.compared, meta.fallbacks, meta.engine) == (3, 0, fast.name)


def test_a_unit_of_the_fast_engine_has_the_bytes_of_the_reference(tmp_path, tokenizer):
    unit = unit_of(tmp_path, [*edge_texts((EOT,)), ""])
    fast = fast_engine(tokenizer, keep_control=False)
    for name, engine in (("fast", fast), ("slow", None)):
        tokenize_unit(unit, Reading(), tokenizer, TextSettings(), tmp_path / name, fast=engine)
    for name in ("tokens", "lengths", "records", "text_hash", "quarantine.jsonl"):
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "slow" / name).read_bytes()


# Choosing


def choose(wanted, tokenizer, folder):
    shelved = Shelved(str(folder), None, None)
    hold(shelved, tokenizer)
    return choose_engine(wanted, shelved, keep_control=False, inexact=inexact_engines(folder))


def test_auto_takes_the_fast_engine_where_it_serves(tmp_path, tokenizer):
    assert choose("auto", tokenizer, tmp_path) == (True, "")
    assert choose("fastokens", tokenizer, tmp_path) == (True, "")
    assert choose("tokenizers", tokenizer, tmp_path) == (False, "asked for")


def test_auto_takes_the_reference_where_it_does_not(tmp_path):
    tokenizer = load_tokenizer(str(save(unigram(), tmp_path / "unigram")))
    is_fast, reason = choose("auto", tokenizer, tmp_path)
    assert not is_fast
    assert "does not support" in reason
    with pytest.raises(ConfigError, match=r"engine: fastokens: .*does not support.*use `engine: auto`"):
        choose("fastokens", tokenizer, tmp_path)


def test_an_engine_that_differs_on_an_edge_text_is_not_chosen(tmp_path, tokenizer, monkeypatch):
    wrong = wrong_on("don't", reference_engine(tokenizer, keep_control=False))
    monkeypatch.setattr(held, "fast_engine", lambda tokenizer, keep_control: wrong)
    is_fast, reason = choose("auto", tokenizer, tmp_path)
    assert not is_fast
    assert "gives other tokens" in reason
    assert "don't" in reason


def test_an_engine_that_was_found_inexact_is_not_chosen_again(tmp_path, tokenizer):
    name = fast_engine(tokenizer, keep_control=False).name
    assert inexact_engines(tmp_path) == frozenset()
    distrust(tmp_path, name)
    assert inexact_engines(tmp_path) == {name}
    assert choose("auto", tokenizer, tmp_path).reason.startswith(f"{name} was found")
    with pytest.raises(ConfigError, match="was found to give other tokens"):
        choose("fastokens", tokenizer, tmp_path)
