"""An extended tokenizer: new tokens are one token, old ids stay, other text reads as before, files agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    CORPUS,
    EOT,
    bpe_with_bos,
    byte_level_bpe,
    metaspace_bpe,
    save,
    unigram,
    whole_text_bpe,
    word_piece,
)
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from llmt_prep import extension
from llmt_prep.extension import Extended, extend_tokenizer, read_tokens
from llmt_prep.tokenizer import load_tokenizer
from llmt_shared.errors import ConfigError

BUILDERS = [byte_level_bpe, bpe_with_bos, metaspace_bpe, whole_text_bpe]
words = st.text(st.sampled_from("abexyzfoé日本☃👍"), min_size=1, max_size=7)
texts = st.text(st.sampled_from("abexyzfoé日本☃👍 \n.1'"), max_size=40) | st.sampled_from(CORPUS)


@pytest.fixture(scope="module", params=BUILDERS)
def old(request, tmp_path_factory) -> Path:
    return save(request.param(), tmp_path_factory.mktemp("old"), eos_token=EOT)


def extended(old: Path, out: Path, tokens: list[str], **options: object) -> tuple[Tokenizer, Extended]:
    result = extend_tokenizer(str(old), tokens, out, **options)
    return load_tokenizer(str(out)).backend, result


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def back(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=False)


def what_bpe_sees(tokenizer: Tokenizer, text: str) -> str:
    text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return (
        "\0".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
        if tokenizer.pre_tokenizer
        else text
    )


@settings(max_examples=25)
@given(tokens=st.lists(words, min_size=1, max_size=5), text=texts)
def test_round_trip(old, tmp_path_factory, tokens, text):
    before = load_tokenizer(str(old)).backend
    after, result = extended(old, tmp_path_factory.mktemp("new") / "out", tokens, as_added_token=True)
    vocabulary, longer = before.get_vocab(with_added_tokens=True), after.get_vocab(with_added_tokens=True)
    assert vocabulary.items() <= longer.items()
    assert sorted(set(longer.values()) - set(vocabulary.values())) == list(
        range(max(vocabulary.values()) + 1, result.max_id + 1)
    )
    for token in tokens:
        assert len(ids_of(after, token)) == 1
        assert back(after, token) == token
    in_context = f"{text}{tokens[0]} {tokens[-1]}{text}"
    assert back(after, in_context) == back(before, in_context)
    seen = what_bpe_sees(before, text)
    made = {what_bpe_sees(before, token) for token in result.added} | {*result.intermediates}
    if not any(token in seen for token in made) and not any(token in text for token in result.as_added_tokens):
        assert ids_of(after, text) == ids_of(before, text)


def test_text_without_new_tokens_is_tokenized_as_before(old, tmp_path):
    before = load_tokenizer(str(old)).backend
    after, result = extended(old, tmp_path / "out", ["zqqx", "zvvx", "☃"])
    assert result.added == ("zqqx", "zvvx", "☃")
    for text in [*CORPUS, EOT, "naïve quick Ω 👍"]:
        assert not any(token in what_bpe_sees(before, text) for token in result.intermediates)
        assert ids_of(after, text) == ids_of(before, text)


def test_added_tokens_outside_the_model_keep_their_ids(tmp_path):
    """`tokenizers` numbers them by the model's size, which grows: two tokens would share an id."""
    old = save(bpe_with_bos(), tmp_path / "old")
    begin = load_tokenizer(str(old)).backend.token_to_id("<|begin|>")
    after, _ = extended(old, tmp_path / "out", ["zyzzyva"])
    assert after.token_to_id("<|begin|>") == begin
    assert after.encode("zyzzyva").ids == [begin, after.token_to_id("zyzzyva")]


def test_a_token_that_begins_with_a_space_is_another_than_the_word(tmp_path):
    old = save(byte_level_bpe(), tmp_path / "old")
    after, _ = extended(old, tmp_path / "out", [" zyzzyva", "zyzzyva"])
    assert ids_of(after, "zyzzyva zyzzyva") == [after.token_to_id("zyzzyva"), after.token_to_id("Ġzyzzyva")]


def test_what_is_one_token_already_is_said_and_left(old, tmp_path):
    before = load_tokenizer(str(old)).backend
    _, result = extended(old, tmp_path / "out", ["the", "xyz", "xyz"])
    wanted = ("the",) if len(ids_of(before, "the")) == 1 else ()
    assert result.already_there == wanted
    assert result.added == (("xyz",) if wanted else ("the", "xyz"))


def test_intermediates_are_counted_and_those_that_are_wanted_too_are_not(tmp_path):
    old = save(byte_level_bpe(), tmp_path / "old")
    _, alone = extended(old, tmp_path / "a", ["zzzz"])
    assert alone.intermediates == ("zz",)
    _, both = extended(old, tmp_path / "b", ["zzzz", "zz"])
    assert both.intermediates == ()
    assert (both.vocab_size, both.max_id) == (alone.vocab_size, alone.max_id)


def test_the_padding_token_is_special_and_named(old, tmp_path):
    (old / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": EOT}}))
    _, result = extended(old, tmp_path / "out", ["zyzzyva"], pad_token="<|pad|>", special_tokens=["<|tool|>"])
    loaded = load_tokenizer(str(tmp_path / "out"))
    assert result.special == ("<|tool|>", "<|pad|>")
    assert (loaded.pad_id, loaded.max_id) == (result.max_id, result.max_id)
    assert {"<|tool|>", "<|pad|>"} <= set(loaded.control_tokens)
    assert loaded.backend.encode("a<|pad|>", add_special_tokens=False).ids[-1] == loaded.pad_id
    assert json.loads(loaded.files["special_tokens_map.json"])["pad_token"] == "<|pad|>"


def test_a_special_token_that_exists_can_become_padding(tmp_path):
    old = save(byte_level_bpe(), tmp_path / "old")
    _, result = extended(old, tmp_path / "out", [], pad_token="<|im_start|>")
    assert result.special == ()
    assert result.already_there == ("<|im_start|>",)
    assert load_tokenizer(str(tmp_path / "out")).pad_id == 1


def test_all_files_go_along_and_those_beside_agree(tmp_path):
    old = save(byte_level_bpe(), tmp_path / "old", eos_token=EOT, added_tokens_decoder={"0": {"content": EOT}})
    (old / "chat_template.jinja").write_text("{{ x }}")
    (old / "added_tokens.json").write_text("{}")
    (old / "merges.txt").write_text("of the slow tokenizer")
    _, result = extended(old, tmp_path / "out", [], pad_token="<|pad|>")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "added_tokens.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["eos_token"] == EOT
    assert config["added_tokens_decoder"][str(result.max_id)]["content"] == "<|pad|>"
    assert json.loads((out / "added_tokens.json").read_text()) == {"<|pad|>": result.max_id}


def test_merges_written_as_strings_are_read_too(tmp_path):
    old = save(byte_level_bpe(), tmp_path / "old")
    described = json.loads((old / "tokenizer.json").read_text())
    described["model"]["merges"] = [" ".join(pair) for pair in described["model"]["merges"]]
    (old / "tokenizer.json").write_text(json.dumps(described))
    after, _ = extended(old, tmp_path / "out", ["zyzzyva"])
    assert after.encode("zyzzyva quick").tokens == ["zyzzyva", *byte_level_bpe().encode(" quick").tokens]


def refuse(folder: Path, reason: str, tokens: list[str], **options: object) -> None:
    out = folder.parent / "refused" / "out"
    with pytest.raises(ConfigError, match=reason):
        extend_tokenizer(str(folder), tokens, out, **options)
    assert not out.parent.exists() or not list(out.parent.iterdir())


@pytest.mark.parametrize(("build", "kind"), [(word_piece, "WordPiece"), (unigram, "Unigram")])
def test_other_kinds_than_bpe_are_refused(tmp_path, build, kind):
    refuse(save(build(), tmp_path / "old"), f"a {kind} tokenizer; wanted BPE", ["a"])


def test_tokens_that_are_taken_apart_are_refused_or_become_added_tokens(tmp_path):
    old = save(byte_level_bpe(), tmp_path / "old")
    refuse(old, r"takes apart or changes 'foo bar', 'a1' before BPE.* use --as-added-token", ["foo bar", "zz", "a1"])
    after, result = extended(old, tmp_path / "out", ["foo bar", "zz", "a1"], as_added_token=True)
    assert (result.added, result.as_added_tokens) == (("zz",), ("foo bar", "a1"))
    assert after.encode("xfoo bary").tokens == ["x", "foo bar", "y"]
    assert load_tokenizer(str(tmp_path / "out")).control_tokens == load_tokenizer(str(old)).control_tokens


def test_tokens_that_the_normalizer_changes_are_refused(tmp_path):
    tokenizer = byte_level_bpe()
    tokenizer.normalizer = normalizers.Lowercase()
    refuse(save(tokenizer, tmp_path / "old"), "takes apart or changes 'Zyzzyva'", ["Zyzzyva"])


def test_an_added_token_that_does_not_read_the_same_is_refused(tmp_path):
    tokenizer = byte_level_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    old = save(tokenizer, tmp_path / "old")
    refuse(old, "cannot make one token of 'é1é' that reads the same", ["é1é"], as_added_token=True)


def test_a_new_token_that_holds_a_special_one_is_refused(tmp_path):
    tokenizer = metaspace_bpe()
    tokenizer.add_special_tokens(["<mark>"])
    refuse(save(tokenizer, tmp_path / "old"), "cannot make one token of 'x<mark>'", ["x<mark>"])


def test_a_special_token_that_plain_text_would_become_is_refused(tmp_path):
    refuse(save(byte_level_bpe(), tmp_path / "old"), "'!' is an ordinary token of text", [], pad_token="!")
    refuse(
        save(metaspace_bpe(), tmp_path / "b"), "text that says '☃' would become the special", [], special_tokens=["☃"]
    )
    described = json.loads(byte_level_bpe().to_str())
    described["model"]["ignore_merges"] = True
    whole_words = save(Tokenizer.from_str(json.dumps(described)), tmp_path / "c")
    refuse(whole_words, "text that says 'PAD' would become the special", [], pad_token="PAD")


def test_tokens_that_cannot_be_are_refused(tmp_path):
    old = save(byte_level_bpe(), tmp_path / "old")
    refuse(old, "a new token is empty", [""])
    refuse(old, "'x' is both a new token and a special one", ["x"], pad_token="x")
    prefixed = Tokenizer(models.BPE({"a": 0, "##b": 1}, [], continuing_subword_prefix="##"))
    refuse(save(prefixed, tmp_path / "b"), "continuing_subword_prefix '##'", ["ab"])


def test_an_output_that_exists_is_left_alone(tmp_path):
    old = save(byte_level_bpe(), tmp_path / "old")
    with pytest.raises(ConfigError, match="exists already"):
        extend_tokenizer(str(old), ["zz"], old)
    assert json.loads((old / "tokenizer.json").read_text()) == json.loads(byte_level_bpe().to_str())


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    old = save(byte_level_bpe(), tmp_path / "old", eos_token=EOT)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(extension, "_check", fail)
    with pytest.raises(OSError, match="No space"):
        extend_tokenizer(str(old), ["zz"], tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_same_input_gives_the_same_bytes(tmp_path):
    old = save(byte_level_bpe(), tmp_path / "old")
    for name in "ab":
        extend_tokenizer(str(old), ["zyzzyva", "quixotry"], tmp_path / name, pad_token="<|pad|>")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_transformers_gives_the_same_ids(tmp_path):
    tokenizer = bpe_with_bos()
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    old = save(tokenizer, tmp_path / "old", eos_token=EOT, tokenizer_class="PreTrainedTokenizerFast")
    tokens = ["zyzzyva", " quixotry", "foo bar"]
    after, _ = extended(old, tmp_path / "out", tokens, pad_token="<|pad|>", as_added_token=True)
    text = f"<tool>zyzzyva quixotry foo bar<|pad|>{CORPUS[0]}"
    program = (
        "import sys, json; from transformers import AutoTokenizer;"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(json.dumps([t(sys.argv[2])['input_ids'], t.pad_token_id]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out"), text]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert json.loads(printed) == [after.encode(text).ids, after.token_to_id("<|pad|>")]


def test_a_file_of_tokens_has_one_a_line_spaces_and_all(tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n two \n\xe6\x97\xa5\x0b\xe2\x80\xa8x\n\n")
    assert read_tokens(path) == ["one", " two ", "日\x0b\u2028x"]


def test_a_file_of_tokens_that_cannot_be_read_is_named_with_its_line(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"a\nb\n\xff\n")
    with pytest.raises(ConfigError, match=r"bad\.txt:3: not UTF-8"):
        read_tokens(tmp_path / "bad.txt")
    with pytest.raises(ConfigError, match=r"none\.txt: cannot be read: No such file"):
        read_tokens(tmp_path / "none.txt")
