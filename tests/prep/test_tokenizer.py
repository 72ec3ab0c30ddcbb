"""Loading a tokenizer from its files: what is known of it, and one message for each way in which it can be broken."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_tokenizers import EOT, bpe_with_bos, byte_level_bpe, save, unigram, word_piece
from tokenizers import AddedToken, Tokenizer, models

from llmt_prep.tokenizer import load_tokenizer
from llmt_shared.errors import ConfigError


def test_a_folder_and_its_tokenizer_json_are_the_same_tokenizer(tmp_path):
    folder = save(byte_level_bpe(), tmp_path, eos_token=EOT)
    by_folder, by_file = load_tokenizer(str(folder)), load_tokenizer(str(folder / "tokenizer.json"))
    assert by_folder.digest == by_file.digest
    assert by_folder.eos_id == by_file.eos_id == 0
    assert by_folder.commit is None


def test_a_json_file_of_another_name_is_read_alone(tmp_path):
    (save(byte_level_bpe(), tmp_path, eos_token=EOT) / "tokenizer.json").rename(tmp_path / "mine.json")
    loaded = load_tokenizer(str(tmp_path / "mine.json"))
    assert list(loaded.files) == ["tokenizer.json"]
    assert loaded.eos_id is None


def test_the_files_are_those_that_training_and_export_need(tmp_path):
    folder = save(byte_level_bpe(), tmp_path, eos_token=EOT, chat_template="{{ x }}")
    (folder / "additional_chat_templates").mkdir()
    wanted = ["additional_chat_templates/tool.jinja", "chat_template.jinja", "special_tokens_map.json"]
    for name in [*wanted, "model.safetensors", "README.md"]:
        (folder / name).write_bytes(b"{}")
    loaded = load_tokenizer(str(folder))
    assert list(loaded.files) == [*wanted, "tokenizer.json", "tokenizer_config.json"]
    assert all(loaded.files[name] == (folder / name).read_bytes() for name in loaded.files)


def test_the_digest_changes_with_names_and_contents(tmp_path):
    folder = save(byte_level_bpe(), tmp_path)
    digests = [load_tokenizer(str(folder)).digest]
    for name, content in (("chat_template.jinja", "a"), ("chat_template.jinja", "b"), ("tokenizer_config.json", "{}")):
        (folder / name).write_text(content)
        digests.append(load_tokenizer(str(folder)).digest)
    assert len(set(digests)) == 4
    assert all(len(digest) == len(hashlib.sha256().hexdigest()) for digest in digests)


@pytest.mark.parametrize("token", [EOT, {"content": EOT, "lstrip": False, "__type": "AddedToken"}])
def test_special_tokens_come_from_either_file_in_either_form(tmp_path, token):
    folder = save(byte_level_bpe(), tmp_path)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": token, "bos_token": "<|im_start|>"}))
    loaded = load_tokenizer(str(folder))
    assert (loaded.eos_id, loaded.bos_id, loaded.pad_id) == (0, 1, None)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": token, "pad_token": None}))
    assert load_tokenizer(str(folder)).bos_id == 0


def test_arguments_win_over_the_files(tmp_path):
    folder = save(byte_level_bpe(), tmp_path, eos_token=EOT)
    loaded = load_tokenizer(str(folder), eos_token="<|im_start|>", bos_token=EOT)
    assert (loaded.eos_id, loaded.bos_id) == (1, 0)


def test_a_token_that_the_vocabulary_lacks_names_the_nearest(tmp_path):
    folder = save(byte_level_bpe(), tmp_path)
    with pytest.raises(ConfigError, match=r"eos_token '<\|endofetxt\|>' is not in .* did you mean '<\|endoftext\|>'"):
        load_tokenizer(str(folder), eos_token="<|endofetxt|>")


def test_only_a_post_processor_that_puts_bos_first_adds_bos(tmp_path):
    assert load_tokenizer(str(save(bpe_with_bos(), tmp_path / "a", bos_token="<|begin|>"))).adds_bos
    assert not load_tokenizer(str(save(bpe_with_bos(), tmp_path / "b", bos_token=EOT))).adds_bos
    assert not load_tokenizer(str(save(byte_level_bpe(), tmp_path / "c", bos_token=EOT))).adds_bos
    assert not load_tokenizer(str(save(word_piece(), tmp_path / "d"))).adds_bos


def test_control_tokens_are_the_special_ones_and_the_named_ones(tmp_path):
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("<end>", special=False)])
    loaded = load_tokenizer(str(save(tokenizer, tmp_path, eos_token="<end>")))
    assert loaded.control_tokens == (EOT, "<|im_start|>", "<end>")
    assert loaded.control_ids == {0, 1, tokenizer.token_to_id("<end>")}


def test_an_eos_that_the_configuration_calls_unknown_too_stays_a_control_token(tmp_path):
    loaded = load_tokenizer(str(save(byte_level_bpe(), tmp_path, eos_token=EOT, unk_token=EOT)))  # as Pythia's
    assert loaded.eos_id in loaded.control_ids
    assert EOT in loaded.control_tokens


@pytest.mark.parametrize(("build", "unk"), [(word_piece, "[UNK]"), (unigram, "<unk>")])
def test_the_unknown_token_is_no_control_token(tmp_path, build, unk):
    loaded = load_tokenizer(str(save(build(), tmp_path)))
    assert loaded.unk_id == build().token_to_id(unk)
    assert unk not in loaded.control_tokens
    assert loaded.unk_id not in loaded.control_ids


def test_holes_in_the_vocabulary_are_counted(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    loaded = load_tokenizer(str(save(tokenizer, tmp_path)))
    assert (loaded.vocab_size, loaded.max_id) == (2, 70_000)


def test_truncation_padding_and_dropout_are_off(tmp_path):
    tokenizer = byte_level_bpe()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tokenizer.model.dropout = 0.9
    backend = load_tokenizer(str(save(tokenizer, tmp_path))).backend
    text = "The quick brown fox jumps over"
    assert backend.encode(text).ids == byte_level_bpe().encode(text).ids


def fail(spec: Path | str, *wanted: str, **arguments: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(spec), **arguments)
    assert str(error.value).startswith(str(spec))
    for part in wanted:
        assert part in str(error.value)


def test_a_slow_tokenizer_says_how_to_convert_it(tmp_path):
    (tmp_path / "tokenizer.model").touch()
    fail(tmp_path, "no tokenizer.json in it", "a slow tokenizer (tokenizer.model)", "save_pretrained")


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    fail(tmp_path, "no tokenizer.json in it", "save_pretrained")


@pytest.mark.parametrize("spec", ["/nowhere/at/all", "./nowhere", "some/tokenizer.json", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(spec):
    fail(spec, "no such tokenizer")


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("tokenizer.json", "{broken", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", "[]", "tokenizer.json is not a JSON object"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Nonsense"}}', "tokenizer.json is not one that"),
        ("tokenizer_config.json", "{broken", "tokenizer_config.json is not valid JSON"),
        ("special_tokens_map.json", "\xff", "special_tokens_map.json is not valid JSON"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, wanted):
    (save(byte_level_bpe(), tmp_path) / name).write_text(content, "latin-1")
    fail(tmp_path, wanted)


def test_a_local_path_has_no_revision(tmp_path):
    fail(save(byte_level_bpe(), tmp_path), "no revision 'main'", revision="main")


HUB = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
from llmt_prep.tokenizer import load_tokenizer
from llmt_shared.errors import ConfigError
print(load_tokenizer("some-one/some-thing").commit)
try:
    load_tokenizer("nobody/nothing")
except ConfigError as error:
    print(error)
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


def test_a_hub_id_is_pinned_to_its_commit_without_torch(tmp_path, monkeypatch):
    """Offline, from a cache laid out as huggingface_hub lays it out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub/models--some-one--some-thing"
    save(byte_level_bpe(), cache / "snapshots" / commit, eos_token=EOT)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    run = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, check=True)
    found, error, heavy = run.stdout.splitlines()
    assert found == commit
    assert "nobody/nothing: no such folder, and the hub does not give it" in error
    assert heavy == "[]"


def test_a_token_given_instead_reaches_the_files_and_loading_those_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    given = load_tokenizer(str(folder), eos_token="<|endoftext|>")
    config = json.loads(given.files["tokenizer_config.json"])
    assert config["eos_token"] == "<|endoftext|>"
    for name, content in given.files.items():
        (folder / name).write_bytes(content)
    again = load_tokenizer(str(folder))
    assert (again.digest, again.eos_id) == (given.digest, given.eos_id)
    assert load_tokenizer(str(folder), eos_token="<|endoftext|>").digest == given.digest
