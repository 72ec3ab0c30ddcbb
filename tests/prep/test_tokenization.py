"""A unit of the store holds what bare `tokenizers` gives, BOS and EOS once, and no control token from a text."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import EOT, bpe_with_bos, byte_level_bpe, save, unigram, word_piece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from llmt_prep import engines, tokenization
from llmt_prep.documents import Reading, Unit, split_into_units
from llmt_prep.store import StoreUnit, UnitMeta, hash_text, open_unit, read_quarantine
from llmt_prep.tokenization import TextSettings, hash_content, tokenize_unit, unit_facts, unit_key
from llmt_prep.tokenizer import LoadedTokenizer, load_tokenizer
from llmt_shared.errors import ConfigError, DataError

BARE = TextSettings(bos="never", eos="never")
BUILDERS = {"bpe": byte_level_bpe, "bpe with bos": bpe_with_bos, "word piece": word_piece, "unigram": unigram}

nasty_text = st.lists(
    st.sampled_from(
        [EOT, "<|im_start|>", "<|begin|>", "<s>", "</s>", "<unk>", "[UNK]", "[SEP]", "<|", "|>", "endoftext", " ", "  ",
         "\n", "\r\n", "\t", "\0", "\u200b", "\u00a0", "\ufeff", "\ufffd", "é", "e\u0301", "日本",
         "\U0001f468\u200d\U0001f469",
         "The quick", "segment_ids", "12345", "▁", "##", "Ġ"]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    max_size=10,
).map("".join)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedTokenizer]:
    roles = {
        "bpe": {"eos_token": EOT},
        "bpe with bos": {"bos_token": "<|begin|>", "eos_token": EOT},
        "word piece": {"eos_token": "[SEP]"},
        "unigram": {"bos_token": "<s>", "eos_token": "</s>"},
    }
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: load_tokenizer(str(save(BUILDERS[name](), folder / name, **roles[name]))) for name in BUILDERS}


def make(
    folder: Path, texts: list[str], tokenizer: LoadedTokenizer, text_settings: TextSettings = BARE
) -> tuple[StoreUnit, UnitMeta]:
    """Tokenize texts as one unit; a fresh folder is made below the one given."""
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (unit,) = split_into_units(path, "auto", 1 << 30)
    directory = folder / f"unit{len(list(folder.iterdir()))}"
    meta = tokenize_unit(unit, Reading(), tokenizer, text_settings, directory)
    assert open_unit(directory).meta == meta
    assert meta.records == meta.documents + meta.empty + meta.quarantined == len(texts)
    return open_unit(directory), meta


def documents_of(unit: StoreUnit) -> list[list[int]]:
    borders = np.cumsum(unit.lengths.astype(np.int64))
    return [part.tolist() for part in np.split(unit.tokens, borders)[:-1]]


@pytest.mark.parametrize("name", BUILDERS)
@given(texts=st.lists(nasty_text, max_size=5))
def test_tokens_equal_those_of_bare_tokenizers(tmp_path_factory, tokenizers, name, texts):
    unit, meta = make(tmp_path_factory.mktemp("oracle"), texts, tokenizers[name])
    bare = BUILDERS[name]()
    bare.encode_special_tokens = True
    wanted = {i: bare.encode(text, add_special_tokens=False).ids for i, text in enumerate(texts) if text}
    wanted = {i: ids for i, ids in wanted.items() if ids}
    if name == "unigram":  # its model holds the control tokens as plain words too
        wanted = {i: ids for i, ids in wanted.items() if not tokenizers[name].control_ids.intersection(ids)}
    assert dict(zip(unit.records.tolist(), documents_of(unit), strict=True)) == wanted
    assert unit.text_hash.tolist() == [hash_text(texts[i].encode()) for i in wanted]
    assert meta.text_bytes == sum(len(texts[i].encode()) for i in wanted)


@pytest.mark.parametrize("name", BUILDERS)
@given(texts=st.lists(nasty_text, max_size=5))
def test_no_text_becomes_a_control_token(tmp_path_factory, tokenizers, name, texts):
    unit, _ = make(tmp_path_factory.mktemp("control"), texts, tokenizers[name])
    assert not tokenizers[name].control_ids.intersection(unit.tokens.tolist())


def test_the_strings_of_control_tokens_stay_text(tmp_path, tokenizers):
    text = f"web page says {EOT} here"
    unit, meta = make(tmp_path, [text, "none"], tokenizers["bpe"])
    assert tokenizers["bpe"].backend.decode(documents_of(unit)[0]) == text
    assert (meta.documents_with_control_strings, meta.quarantined) == (1, 0)


def test_keep_makes_control_tokens_of_them(tmp_path, tokenizers):
    unit, meta = make(
        tmp_path, [f"a{EOT}b"], tokenizers["bpe"], dataclasses.replace(BARE, special_tokens_in_text="keep")
    )
    assert documents_of(unit)[0].count(0) == 1
    assert meta.documents_with_control_strings == 1


def test_error_names_the_line_inside_any_unit_and_the_way_out(tmp_path, tokenizers):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["one", "two", "three", f"and {EOT}"]))
    unit = split_into_units(path, "auto", path.stat().st_size // 2)[1]
    strict = dataclasses.replace(BARE, special_tokens_in_text="error")
    with pytest.raises(DataError, match=r"a\.jsonl:4: .*'<\|endoftext\|>'.*`as_text`.*`keep`"):
        tokenize_unit(unit, Reading(), tokenizers["bpe"], strict, tmp_path / "unit")
    assert not (tmp_path / "unit").exists()


def test_error_lets_clean_text_pass(tmp_path, tokenizers):
    strict = dataclasses.replace(BARE, special_tokens_in_text="error")
    assert make(tmp_path, ["clean", "<| too"], tokenizers["bpe"], strict)[1].documents == 2


def test_a_text_that_becomes_a_control_token_all_the_same_is_quarantined(tmp_path):
    """`</s>` is a plain word of this vocabulary, so no switch of the library keeps the text from it."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    loaded = load_tokenizer(str(save(tokenizer, tmp_path / "t", eos_token="</s>")))
    unit, meta = make(tmp_path, ["a a", "a </s> a", "b a"], loaded)
    assert documents_of(unit) == [[2, 2], [0, 2]]
    (bad,) = read_quarantine(unit.path)
    assert (bad.record, bad.preview) == (1, "a </s> a")
    assert "control token '</s>' (id 1)" in bad.reason
    assert (meta.quarantined, meta.documents_with_control_strings) == (1, 1)


def test_an_unknown_token_is_no_control_token(tmp_path, tokenizers):
    unit, meta = make(tmp_path, ["☃ [UNK]"], tokenizers["word piece"])
    assert tokenizers["word piece"].unk_id in unit.tokens
    assert meta.quarantined == 0


def test_a_text_that_the_tokenizer_refuses_is_quarantined_alone(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))  # its unknown token does not exist
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unit, meta = make(tmp_path, ["a", "a b", "a a"], load_tokenizer(str(save(tokenizer, tmp_path / "t"))))
    assert documents_of(unit) == [[0], [0, 0]]
    assert "cannot encode this text" in next(read_quarantine(unit.path)).reason
    assert meta.quarantined == 1


# BOS and EOS


@pytest.mark.parametrize(
    ("name", "bos", "eos", "first", "last"),
    [
        ("bpe", "auto", "always", [], [0]),
        ("bpe", "auto", "never", [], []),
        ("bpe with bos", "auto", "always", ["<|begin|>"], [0]),
        ("bpe with bos", "never", "always", [], [0]),
        ("bpe with bos", "always", "never", ["<|begin|>"], []),
        ("unigram", "auto", "always", [], [2]),
        ("unigram", "always", "always", ["<s>"], [2]),
        ("word piece", "auto", "always", [], [3]),
    ],
)
def test_bos_and_eos_stand_around_the_text(tmp_path, tokenizers, name, bos, eos, first, last):
    unit, _ = make(tmp_path, ["the lazy dog", ""], tokenizers[name], TextSettings(bos=bos, eos=eos))
    text = BUILDERS[name]().encode("the lazy dog", add_special_tokens=False).ids
    assert documents_of(unit) == [[*map(tokenizers[name].backend.token_to_id, first), *text, *last]]


@pytest.mark.parametrize("text", ["{b}a{e}", "{b}a", "a{e}", "a", "{b}{e}"])
def test_neither_is_doubled_where_the_text_has_it_already(tmp_path, tokenizers, text):
    keep = TextSettings("keep", "always", "always")
    unit, _ = make(tmp_path, [text.format(b="<|begin|>", e=EOT)], tokenizers["bpe with bos"], keep)
    (ids,) = documents_of(unit)
    bos_id, eos_id = tokenizers["bpe with bos"].bos_id, tokenizers["bpe with bos"].eos_id
    assert (ids.count(bos_id), ids.count(eos_id), ids[0], ids[-1]) == (1, 1, bos_id, eos_id)


@pytest.mark.parametrize(("role", "text_settings"), [("eos", TextSettings()), ("bos", TextSettings(bos="always"))])
def test_wanting_a_token_that_the_tokenizer_lacks_says_how_to_go_on(tmp_path, role, text_settings):
    named = {"bos_token": EOT, "eos_token": EOT}
    loaded = load_tokenizer(str(save(byte_level_bpe(), tmp_path / "t", **{**named, f"{role}_token": None})))
    with pytest.raises(ConfigError, match=rf"give `{role}_token` .*<\|im_start\|>.*or set `{role}: never`"):
        make(tmp_path, ["a"], loaded, text_settings)


# counts and sizes


def test_empty_texts_are_counted_and_not_stored(tmp_path, tokenizers):
    for name in BUILDERS:
        folder = tmp_path / name
        folder.mkdir()
        unit, meta = make(folder, ["", "a", ""], tokenizers[name], TextSettings(bos="never"))
        assert (meta.empty, meta.documents, unit.records.tolist()) == (2, 1, [1])


def test_a_text_of_spaces_is_a_document(tmp_path, tokenizers):
    _, meta = make(tmp_path, ["  ", "\n"], tokenizers["bpe"])
    assert (meta.documents, meta.empty) == (2, 0)


def test_a_text_without_any_token_is_empty(tmp_path, tokenizers):
    _, meta = make(tmp_path, ["   "], tokenizers["word piece"])
    assert (meta.documents, meta.empty) == (0, 1)


def test_bad_records_are_kept_in_order_with_their_reasons(tmp_path, tokenizers):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{bad\n\n{"text": 5}\n{"text": "b"}')
    (unit,) = split_into_units(path, "auto", 1 << 20)
    meta = tokenize_unit(unit, Reading(), tokenizers["bpe"], BARE, tmp_path / "unit")
    assert [bad.record for bad in read_quarantine(tmp_path / "unit")] == [1, 3]
    assert open_unit(tmp_path / "unit").records.tolist() == [0, 4]
    assert (meta.records, meta.documents, meta.quarantined, meta.lines) == (4, 2, 2, 5)


@settings(max_examples=10)
@given(st.integers(1, 200))
def test_the_size_of_a_batch_changes_nothing(tmp_path_factory, tokenizers, batch_bytes):
    texts = ["The quick brown fox", "", "x" * 100, f"y {EOT}", "日本"] * 3
    folder = tmp_path_factory.mktemp("batches")
    whole, _ = make(folder, texts, tokenizers["bpe"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "BATCH_BYTES", batch_bytes)
        small, _ = make(folder, texts, tokenizers["bpe"])
    for file in whole.path.iterdir():
        assert file.read_bytes() == (small.path / file.name).read_bytes()


def test_ids_above_65535_are_stored(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 65_536}, unk_token="a"))
    unit, meta = make(tmp_path, ["b"], load_tokenizer(str(save(tokenizer, tmp_path / "t"))))
    assert (documents_of(unit), meta.dtype) == ([[65_536]], "uint32")


def test_a_document_of_20_mb_is_tokenized(tmp_path):
    long_words = ["x" * 39, "y" * 39]  # few tokens: the test is of the way, not of the library's speed
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(long_words)}, unk_token=long_words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = " ".join(long_words * 260_000)
    unit, meta = make(tmp_path, ["before", text, "behind"], load_tokenizer(str(save(tokenizer, tmp_path / "t"))))
    assert meta.text_bytes == len(text) + 12 > 20_000_000
    assert documents_of(unit) == [[0], [0, 1] * 260_000, [0]]


@pytest.mark.parametrize("line", ["{}", '{"text": ""}'])
def test_records_without_text_do_not_pile_up(tmp_path, tokenizers, monkeypatch, line):
    batches = []
    monkeypatch.setattr(tokenization, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(tokenization, "_write", lambda *arguments: batches.append(arguments[2]))
    path = tmp_path / "a.jsonl"
    path.write_text(f"{line}\n" * 1000)
    tokenize_unit(split_into_units(path, "auto", 1 << 20)[0], Reading(), tokenizers["bpe"], BARE, tmp_path / "unit")
    assert sum(len(batch.bad) + len(batch.texts) for batch in batches) == 1000
    assert max(len(batch.bad) + len(batch.texts) for batch in batches) < 100


def test_a_long_text_that_cannot_be_cut_is_quarantined_with_either_engine(tmp_path, tokenizers, monkeypatch):
    monkeypatch.setattr(engines, "PIECE_CHARACTERS", 10)
    monkeypatch.setattr(engines, "LONGEST_WHOLE", 100)
    texts = ["words " * 30, "x" * 101, "x" * 100]
    for fast in (None, engines.fast_engine(tokenizers["bpe"], keep_control=False)):
        unit = unit_of(tmp_path, texts)
        directory = tmp_path / ("slow" if fast is None else "fast")
        meta = tokenize_unit(unit, Reading(), tokenizers["bpe"], BARE, directory, fast=fast)
        (bad,) = read_quarantine(directory)
        assert (bad.record, meta.documents) == (1, 2)
        assert "its 101 characters would take too much memory at once" in bad.reason


def unit_of(folder: Path, texts: list[str]) -> Unit:
    path = folder / "some.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return split_into_units(path, "auto", 1 << 30)[0]


# keys


def key(unit: Unit, tokenizer: LoadedTokenizer, **changes: object) -> str:
    content = changes.pop("content", "c")
    reading = dataclasses.replace(Reading(), **{k: v for k, v in changes.items() if hasattr(Reading(), k)})
    text_settings = dataclasses.replace(BARE, **{k: v for k, v in changes.items() if hasattr(BARE, k)})
    return unit_key(unit_facts(unit, content, reading, tokenizer, text_settings))


def test_whatever_changes_the_content_changes_the_key(tokenizers, monkeypatch):
    unit, bpe = Unit("a.jsonl", "jsonl", 0, 9), tokenizers["bpe"]
    changed = [
        key(unit, bpe),
        key(dataclasses.replace(unit, start=1), bpe),
        key(dataclasses.replace(unit, stop=8), bpe),
        key(dataclasses.replace(unit, reader="text"), bpe),
        key(dataclasses.replace(unit, path="a.jsonl.gz"), bpe),
        key(unit, bpe, content="d"),
        key(unit, bpe, text_field="body"),
        key(unit, bpe, record="line"),
        key(unit, bpe, max_record_bytes=5),
        key(unit, bpe, special_tokens_in_text="keep"),
        key(unit, bpe, bos="always"),
        key(unit, bpe, eos="always"),
        key(unit, tokenizers["unigram"]),
        key(unit, dataclasses.replace(bpe, eos_id=1)),
        key(unit, dataclasses.replace(bpe, bos_id=1)),
    ]
    monkeypatch.setattr(tokenization, "TOKENIZATION_VERSION", 3)
    changed.append(key(unit, bpe))
    assert len(set(changed)) == len(changed) == 16


def test_a_file_keeps_its_key_when_it_moves(tokenizers):
    units = [Unit(path, "jsonl", 0, 9) for path in ("a.jsonl", "elsewhere/b.ndjson")]
    assert len({key(unit, tokenizers["bpe"], reader=reader) for unit in units for reader in ("auto", "jsonl")}) == 1


def test_the_hash_of_the_content_covers_all_that_the_unit_reads(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "aaaa"}\n{"text": "b"}\n')
    first, second = split_into_units(path, "auto", 16)[:2]
    before = hash_content(first), hash_content(second)
    path.write_text('{"text": "aaab"}\n{"text": "b"}\n')
    assert hash_content(first) != before[0]
    assert hash_content(second) == before[1]


def test_a_second_tokenizer_object_is_as_good(tmp_path, tokenizers):
    """A control string is text again for `as_text` after the same object has served `keep`."""
    bpe = tokenizers["bpe"]
    first, _ = make(tmp_path, [EOT], bpe)
    make(tmp_path, [EOT], bpe, dataclasses.replace(BARE, special_tokens_in_text="keep"))
    again, _ = make(tmp_path, [EOT], bpe)
    assert documents_of(first) == documents_of(again)


def test_an_added_token_that_is_not_special_stays_what_it_is(tmp_path):
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    unit, meta = make(tmp_path, ["<tool>"], load_tokenizer(str(save(tokenizer, tmp_path / "t"))))
    assert documents_of(unit) == [[tokenizer.token_to_id("<tool>")]]
    assert meta.documents_with_control_strings == 0


WHOLE = """
import sys
from pathlib import Path
from llmt_prep.documents import Reading, split_into_units
from llmt_prep.tokenization import TextSettings, hash_content, tokenize_unit, unit_facts, unit_key
from llmt_prep.tokenizer import load_tokenizer
tokenizer = load_tokenizer("t")
for name in ("a.jsonl", "a.txt", "a.parquet", "a.arrow"):
    (unit,) = split_into_units(Path(name), "auto", 1 << 20)
    directory = Path(unit_key(unit_facts(unit, hash_content(unit), Reading(), tokenizer, TextSettings())))
    print(tokenize_unit(unit, Reading(), tokenizer, TextSettings(), directory).documents)
print([name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""


def test_nothing_on_the_way_loads_torch(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import ipc

    save(byte_level_bpe(), tmp_path / "t", eos_token=EOT)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "a.txt").write_text("a")
    table = pa.table({"text": ["a"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WHOLE]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["1", "1", "1", "1", "[]"]
