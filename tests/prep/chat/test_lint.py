"""What is found about templates is what they do, and what cannot be used is refused before any data is read."""

import pytest
from generated_chats import OF_TOKENIZERS, tokenizer

from llmt_prep.chat.lint import PROBES, lint, require_usable
from llmt_prep.chat.template import BUILT_IN, load_template
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_shared.errors import ConfigError

CHATML = OF_TOKENIZERS["chatml without marks"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedTokenizer:
    return tokenizer(tmp_path_factory.mktemp("tokenizer"), "llama-2")


def found(source: str, loaded: LoadedTokenizer, probe: str) -> list[tuple[str, str]]:
    return [(each.fault, each.sentence) for each in lint(load_template(source, loaded)) if each.probe == probe]


def fail(source: str, loaded: LoadedTokenizer, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted) as caught:
        require_usable(load_template(source, loaded))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*BUILT_IN, *OF_TOKENIZERS.values()])
def test_every_template_here_is_usable_and_clear(loaded, name):
    template = load_template(name, loaded)
    require_usable(template)
    assert not {"unclear", "adds", "doubles", "endless"} & {finding.fault for finding in lint(template)}


def test_a_template_that_takes_all_has_no_findings_but_its_tools_and_thinking(loaded):
    probes = {finding.probe for finding in lint(load_template(CHATML, loaded))}
    assert probes == {"thinking", "tools", "text beside a tool call"}


def test_what_is_dropped_is_named(loaded):
    assert found(CHATML, loaded, "tools") == [
        ("drops", "it drops the tool call of message 2 (assistant)"),
        ("drops", "it drops the descriptions of the tools"),
    ]
    assert ("drops", "it drops the thinking of message 4 (assistant)") in found(CHATML, loaded, "thinking")
    assert found("qwen3", loaded, "thinking") == [("drops", "it drops the thinking of message 2 (assistant)")]
    only_users = CHATML.replace("{{'", "{% if message.role != 'system' %}{{'", 1).replace(
        "{% endfor", "{% endif %}{% endfor", 1
    )
    assert found(only_users, loaded, "system prompt") == [("drops", "it drops the content of message 1 (system)")]


def test_an_answer_beside_the_marks_is_named(loaded):
    source = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{% generation %}</s>{% endgeneration %}"
    )
    source += "{% endif %}{% endfor %}"
    sentence = "what the model writes in turn 2 (assistant) is without its content"
    assert found(source, loaded, "two turns") == [("drops", sentence)]
    fail(
        source,
        loaded,
        r"it gives '</s>' as what the model writes in turn 2 \(assistant\), whose content is 'First answ",
    )


def test_trimmed_whitespace_is_named(loaded):
    source = CHATML.replace("message['content']", "(message['content'] | trim)")
    assert found(source, loaded, "outer whitespace") == [
        ("trims", f"it drops whitespace around the content of message {number} ({role})")
        for number, role in enumerate(("system", "user", "assistant"), start=1)
    ]


def test_what_is_doubled_is_named(loaded):
    assert found("{{ bos_token }}{{ bos_token }}" + CHATML, loaded, "two turns") == [
        ("doubles", "it writes the BOS token twice in a row")
    ]
    source = CHATML.replace("message['content']", "message['content'] * 2")
    assert ("doubles", "it writes the content of message 1 (user) 2 times") in found(source, loaded, "two turns")


def test_a_refusal_is_in_the_template_s_own_words(loaded):
    [(fault, sentence)] = found("llama-2", loaded, "two users in a row")
    assert fault == "refuses"
    assert sentence.startswith("it refuses: llama-2 wants user and assistant in turns")


def test_a_rewritten_past_is_named(loaded):
    source = CHATML.replace(
        "{% endfor %}", "{{ '<think>' if loop.last and message['role'] == 'assistant' }}{% endfor %}"
    )
    assert found(source, loaded, "two turns") == [
        ("endless", "turn 2 (assistant) does not end with a control token of the tokenizer")
    ]
    [(fault, sentence)] = found(source, loaded, "six turns")
    assert fault == "unclear"
    assert sentence.startswith("what the model writes in turn 2 (assistant) cannot be told: after it the text is ")


def test_text_before_an_answer_is_named(loaded):
    source = CHATML.replace(
        "+ message['content']", "+ ('Sure: ' if message['role'] == 'assistant' else '') + message['content']"
    )
    assert found(source, loaded, "two turns") == [
        ("adds", "what the model writes in turn 2 (assistant) begins with 'Sure:' before its content")
    ]
    require_usable(load_template(source, loaded))


def test_a_template_that_rewrites_one_question_is_refused_with_the_place(loaded):
    source = "{{ messages | length }}" + CHATML
    fail(
        source,
        loaded,
        r"turn 2 \(assistant\) cannot be told: before it the text is '1<\|im_start.*', in .* '2<\|im_st.*; use",
    )


def test_a_header_that_cannot_be_told_from_an_answer_is_refused(loaded):
    source = CHATML.partition("{% if add_generation_prompt")[0]
    fail(
        source,
        loaded,
        r"the header '<\|im_start\|>assistant' of turn 2 \(assistant\) cannot be told from its content; use",
    )


def test_a_template_that_refuses_a_question_is_refused(loaded):
    fail("{{ raise_exception('no') }}", loaded, "chat template of the mix: no; use a built-in template")


def test_every_content_is_in_its_probe_once():
    for probe in PROBES.values():
        contents = [message["content"].strip() for message in probe.messages if message["content"]]
        assert all(sum(content in other for other in contents) == 1 for content in contents)
