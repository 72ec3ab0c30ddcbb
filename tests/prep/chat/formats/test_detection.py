"""Which format the first records have, and what a reader makes of whatever a record holds."""

import copy
import json

import pytest
from fuzzed_chats import json_values, records
from hypothesis import given, settings
from hypothesis import strategies as st

from llmt_prep.chat.formats import FORMATS, detect, reader
from llmt_prep.chat.messages import FAULTS, Conversation, PreferencePair, UnfitPair
from llmt_shared.errors import ConfigError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
EXAMPLES = {
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "explicit": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "implicit": {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "c"}]},
    "transcript": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
}


def detected(*records: object, kind: str = "sft", **fields: str) -> str:
    return detect(records, kind, fields)


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_format_is_detected(name):
    assert detected(EXAMPLES[name], kind=FORMATS[name].kind) == name


@pytest.mark.parametrize("name", EXAMPLES)
def test_all_formats_read_the_same_chat_or_pair(name):
    asked, answer = dict(USER), dict(ASSISTANT)
    read = reader(name, {})(EXAMPLES[name])
    if FORMATS[name].kind == "sft":
        assert read.messages == (asked, answer)
    else:
        assert read == PreferencePair((asked,), (answer,), ({"role": "assistant", "content": "c"},))


def test_message_lists_as_prompt_and_completion_or_sides_are_detected():
    assert detected({"prompt": [USER], "completion": [ASSISTANT]}) == "prompt_completion"
    assert detected({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, kind="preference") == "explicit"


def test_a_null_prompt_beside_whole_conversations_is_none():
    assert detected({"prompt": None, **EXAMPLES["implicit"]}, kind="preference") == "implicit"


def test_renamed_fields_are_looked_for():
    record = {"dialog": [{"speaker": "user", "text": "a"}]}
    assert detected(record, messages="dialog", role="speaker") == "messages"
    assert detected({"task": {"ask": "a"}, "out": ["b"]}, instruction="task.ask", output="out.0") == "alpaca"


def test_records_that_fit_nothing_are_left_to_quarantine_when_others_agree():
    assert detected({"messages": None}, {}, 3, EXAMPLES["messages"]) == "messages"


def test_records_that_disagree_are_an_error_with_both_names():
    with pytest.raises(ConfigError, match=r"alpaca and messages; say which with `format: "):
        detected(EXAMPLES["messages"], EXAMPLES["alpaca"])


def test_a_transcript_beside_a_prompt_is_an_error_for_it_may_mean_either():
    with pytest.raises(ConfigError, match="explicit and transcript"):
        detected({"prompt": "a", **EXAMPLES["transcript"]}, kind="preference")


def test_an_unknown_format_shows_the_fields_and_the_formats():
    with pytest.raises(ConfigError) as error:
        detected({"turns": [{"who": "me", "said": "a\n"}], "n": 1})
    for part in (
        "'turns' (list of objects with 'who', 'said')",
        "'n' (number)",
        "sharegpt (conversations, from, value)",
    ):
        assert part in str(error.value)


def test_no_records_are_an_error():
    with pytest.raises(ConfigError, match=r"^no records that could tell its format"):
        detected()
    with pytest.raises(ConfigError, match=r"^found an empty list, which is no known format"):
        detected([])


def test_a_misspelt_format_or_field_names_the_nearest():
    with pytest.raises(ConfigError, match="'alpacca' is not known, did you mean 'alpaca'"):
        reader("alpacca", {})
    with pytest.raises(ConfigError, match="alpaca has no 'instructions', did you mean 'instruction'"):
        reader("alpaca", {"instructions": "a"})
    with pytest.raises(ConfigError, match="kind sft has no 'chosen'"):
        detected({}, chosen="a")


@pytest.mark.parametrize("name", EXAMPLES)
@settings(max_examples=120)
@given(record=records)
def test_any_json_value_is_read_or_refused_with_one_line(name, record):
    before = copy.deepcopy(record)
    read = read_or_reason(name, record)
    if isinstance(read, UnfitPair):
        assert FORMATS[name].kind == "preference"
        assert read.fault in FAULTS
    if isinstance(read, ValueError):
        assert len(str(read).splitlines()) == 1
        assert len(str(read)) < 500
    else:
        assert isinstance(read, Conversation if FORMATS[name].kind == "sft" else PreferencePair)
        check_shape(read)
    assert record == before


def read_or_reason(name: str, record: object) -> Conversation | PreferencePair | ValueError:
    try:
        return reader(name, {})(record)
    except ValueError as reason:
        return reason


def check_shape(read: Conversation | PreferencePair) -> None:
    """Every message has a role and a text; instructions stand first; flags are as many as messages."""
    if isinstance(read, PreferencePair):
        assert read.chosen[0]["role"] == read.rejected[0]["role"] == "assistant"
        assert read.chosen != read.rejected
        messages = read.prompt + read.chosen + read.rejected
    else:
        messages = read.messages
        assert len(read.is_trained) in (0, len(messages))
        pairs = zip(read.is_trained, messages, strict=False)
        assert all(message["role"] == "assistant" for is_trained, message in pairs if is_trained)
    assert messages
    assert all(message["role"] in ("system", "developer", "user", "assistant", "tool") for message in messages)
    assert all(isinstance(message["content"], str) for message in messages)
    assert all(message["role"] not in ("system", "developer") for message in messages[2:])


@pytest.mark.parametrize("kind", ["sft", "preference"])
@given(first=st.lists(records, max_size=3))
def test_detection_of_anything_is_a_known_format_or_a_config_error(kind, first):
    try:
        found = detect(first, kind, {})
    except ConfigError:
        return
    assert FORMATS[found].kind == kind


@pytest.mark.parametrize("name", EXAMPLES)
@given(value=json_values)
def test_a_field_with_anything_in_it_is_named_by_its_reason(name, value):
    for key in EXAMPLES[name]:
        read = read_or_reason(name, {**EXAMPLES[name], key: value})
        if isinstance(read, ValueError) and not isinstance(read, UnfitPair):
            assert key in str(read)


def nested(depth: int) -> object:
    return json.loads("[" * depth + "]" * depth)


@pytest.mark.parametrize("name", EXAMPLES)
def test_values_nested_deep_are_refused(name):
    for key in EXAMPLES[name]:
        with pytest.raises(ValueError, match=r"^.{1,400}$"):
            reader(name, {})({**EXAMPLES[name], key: nested(900)})


def test_sides_that_are_nested_too_deep_to_compare_are_refused():
    def side() -> list[object]:
        arguments: dict[str, object] = {}
        for _ in range(30_000):
            arguments = {"a": arguments}
        call = {"function": {"name": "f", "arguments": arguments}}
        return [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]

    with pytest.raises(ValueError, match="nested too deep"):
        reader("implicit", {})({"chosen": side(), "rejected": side()})


def test_ten_thousand_turns_and_a_turn_of_a_megabyte_are_read():
    turns = [USER, ASSISTANT] * 5000
    assert len(reader("messages", {})({"messages": turns}).messages) == 10_000
    long = {"role": "assistant", "content": "x " * 500_000}
    assert reader("messages", {})({"messages": [USER, long]}).messages[1]["content"] == long["content"]
