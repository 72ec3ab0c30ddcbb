"""Finding the template that is meant, wherever tokenizers keep theirs, and one message where there is none."""

import json
import pickle
from pathlib import Path

import pytest
from generated_chats import BOS_AND_EOS, tokenizer
from small_tokenizers import byte_level_bpe, save

from llmt_prep.chat.messages import Conversation
from llmt_prep.chat.render import render
from llmt_prep.chat.template import BUILT_IN, DATE, load_template
from llmt_prep.tokenizer import LoadedTokenizer, load_tokenizer
from llmt_shared.errors import ConfigError

QUESTION = Conversation(({"role": "user", "content": "a"},))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedTokenizer:
    return tokenizer(tmp_path_factory.mktemp("tokenizer"), "llama-2")


def own(folder: Path, **files: object) -> LoadedTokenizer:
    """A tokenizer with more files, by their names without dots."""
    save(byte_level_bpe(), folder)
    for name, content in files.items():
        path = folder / {"jinja": "chat_template.jinja", "json": "chat_template.json"}.get(name, f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_tokenizer(str(folder))


def text(said: str, loaded: LoadedTokenizer, **arguments: str) -> str:
    return render(load_template(said, loaded, **arguments), QUESTION).text


def fail(said: str, loaded: LoadedTokenizer, wanted: str, **arguments: str) -> None:
    with pytest.raises(ConfigError, match=wanted) as caught:
        load_template(said, loaded, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_mark_what_the_model_writes(loaded, name):
    template = load_template(name, loaded)
    assert (template.name, template.has_generation_marks) == (name, True)


def test_a_template_is_a_path_or_jinja_itself(tmp_path, loaded):
    for name in ("mine.jinja", "mine"):
        (tmp_path / name).write_text("é{{ messages[0].content }}", encoding="utf-8")
        assert text(str(tmp_path / name), loaded) == "éa"
    assert text("{{ messages[0].content }}!", loaded) == "a!"
    assert text("{% if true %}b{% endif %}", loaded) == "b"


def test_a_file_of_its_own_wins_then_the_configuration_then_the_old_file(tmp_path):
    files = {"json": {"chat_template": "old"}, "tokenizer_config": {"chat_template": "configured"}, "jinja": "own"}
    for i, (number, wanted) in enumerate([(1, "old"), (2, "configured"), (3, "own")]):
        given = dict(list(files.items())[:number])
        assert text("auto", own(tmp_path / str(i), **given)) == wanted


def test_of_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
    template = load_template("auto", own(tmp_path, tokenizer_config={"chat_template": named}))
    assert (template.source, template.for_tools) == ("plain", None)


def test_a_file_beside_the_default_may_be_for_tools(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("tools")
    template = load_template("auto", own(tmp_path, jinja="plain"))
    assert template.source == "plain"
    assert template.for_tools is not None
    assert template.for_tools.source == "tools"


def test_special_tokens_come_as_strings_from_both_files(tmp_path):
    token = {"content": "<x>", "lstrip": False}
    files = {
        "special_tokens_map": {"bos_token": "<b>", "sep_token": "<s>", "additional_special_tokens": ["<y>"]},
        "tokenizer_config": {"bos_token": token, "eos_token": None},
    }
    loaded = own(tmp_path, **files)
    assert dict(load_template("{{ bos_token }}", loaded).special_tokens) == {"bos_token": "<x>", "sep_token": "<s>"}
    assert text("{{ bos_token }}{{ sep_token }}{{ eos_token is defined }}", loaded) == "<x><s>False"


def test_the_date_is_given_and_not_today(loaded):
    assert text("{{ strftime_now('%Y-%m-%d') }}", loaded) == DATE
    assert text("{{ strftime_now('%d.%m.%y') }}", loaded, date="1999-12-31") == "31.12.99"
    assert "Today Date: 31 Dec 1999" in text("llama-3.2", loaded, date="1999-12-31")


def test_a_template_travels_to_another_process(loaded):
    template = load_template("qwen3", loaded)
    render(template, QUESTION)
    assert render(pickle.loads(pickle.dumps(template)), QUESTION) == render(template, QUESTION)


def test_generation_marks_are_seen(loaded):
    assert not load_template("{{ 'generation' }}", loaded).has_generation_marks
    assert load_template("{%- generation -%}a{%- endgeneration -%}", loaded).has_generation_marks
    captured = "{% macro f() %}{% generation %}a{% endgeneration %}{% endmacro %}{{ f() }}"
    assert not load_template(captured, loaded).has_generation_marks


def test_an_unknown_name_gets_the_nearest(loaded):
    fail(
        "lama-3",
        loaded,
        r"chat template 'lama-3': no such template; did you mean 'llama-3'\? wanted auto, chatml, .*path",
    )
    fail("nothing.jinja", loaded, "nothing.jinja: cannot be read: No such file or directory")


def test_a_file_that_is_not_text_is_refused(tmp_path, loaded):
    (tmp_path / "a.jinja").write_bytes(b"\xff")
    fail(str(tmp_path / "a.jinja"), loaded, "it is not UTF-8")
    fail(str(tmp_path), loaded, "cannot be read: Is a directory")


def test_a_tokenizer_without_a_template_names_the_built_in_ones(loaded):
    fail("auto", loaded, r"the tokenizer's files have none; name a built-in one \(chatml, gemma, .*path of a file")


def test_broken_templates_of_a_tokenizer_say_where(tmp_path):
    for number, found in enumerate([5, [1], [{"name": "x"}]]):
        fail("auto", own(tmp_path / str(number), tokenizer_config={"chat_template": found}), "in tokenizer_config.json")
    named = [{"name": "rag", "template": ""}]
    fail("auto", own(tmp_path / "a", json={"chat_template": named}), "only templates named rag, and none named default")
    (tmp_path / "b").mkdir()
    save(byte_level_bpe(), tmp_path / "b")
    (tmp_path / "b/chat_template.jinja").write_bytes(b"\xff")
    fail("auto", load_tokenizer(str(tmp_path / "b")), "chat_template.jinja of the tokenizer is not UTF-8")


def test_a_template_that_is_no_jinja_names_the_line(loaded):
    fail("a\n{% if %}", loaded, r"chat template of the mix, line 2: .*mend the template")
    fail("{% include 'x' %}", loaded, "line 1: a chat template is one file")


def test_a_date_that_is_none_is_refused(loaded):
    fail("chatml", loaded, "Invalid isoformat string: 'today'.*wanted a date as 2024-07-26", date="today")


@pytest.mark.parametrize("name", [name for name, (_, eos) in BOS_AND_EOS.items() if eos in ("</s>", "<|end_of_text|>")])
def test_a_built_in_template_that_ends_turns_with_eos_wants_one(tmp_path, name):
    fail(name, own(tmp_path), "it ends turns with the EOS token, and the tokenizer names none; set `eos_token`")
