"""Instruction data to conversations: what each format's fields become, and what is refused."""

import json

import pytest
from fuzzed_chats import texts
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep.chat.formats import reader


def said(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def read(name: str, record: object, **fields: str):
    return reader(name, fields)(record)


def messages(*turns: object, **beside: object):
    return read("messages", {"messages": list(turns), **beside})


def refuse(name: str, record: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(name, record)


def refuse_messages(reason: str, *turns: object, **beside: object) -> None:
    refuse("messages", {"messages": list(turns), **beside}, reason)


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
dialogs = st.lists(st.builds(said, st.sampled_from(["user", "assistant", "tool"]), texts), min_size=1, max_size=6)


@given(dialogs)
def test_contents_survive_byte_for_byte(dialog):
    assert list(messages(*dialog).messages) == dialog
    renamed = {"d": [{"r": turn["role"], "c": turn["content"]} for turn in dialog]}
    assert list(read("messages", renamed, messages="d", role="r", content="c").messages) == dialog
    in_parts = [said(turn["role"], [{"type": "text", "text": part} for part in turn["content"]]) for turn in dialog]
    assert list(messages(*in_parts).messages) == dialog
    speakers = {"user": "human", "assistant": "gpt", "tool": "observation"}
    speeches = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in dialog]
    assert list(read("sharegpt", {"conversations": speeches}).messages) == dialog


@given(texts, texts, texts)
def test_alpaca_joins_what_there_is_of_instruction_and_input_by_a_blank_line(instruction, given_input, output):
    record = {"instruction": instruction, "input": given_input, "output": output}
    asked = f"{instruction}\n\n{given_input}" if instruction and given_input else instruction or given_input
    assert read("alpaca", record).messages == (said("user", asked), said("assistant", output))


@pytest.mark.parametrize("nothing", [{}, {"input": None}, {"input": ""}])
def test_alpaca_without_an_input_asks_the_instruction_alone(nothing):
    assert read("alpaca", {"instruction": "a", "output": "b", **nothing}).messages[0]["content"] == "a"


def test_alpaca_history_and_system_come_before():
    record = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}
    roles = [(message["role"], message["content"]) for message in read("alpaca", record).messages]
    assert roles == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def test_a_plain_prompt_and_completion_are_one_text():
    plain = read("prompt_completion", {"prompt": "a ", "completion": " b"})
    assert plain.is_plain
    assert plain.messages == (said("user", "a "), said("assistant", " b"))
    assert not read("prompt_completion", {"prompt": "a", "completion": "b", "system": "s"}).is_plain
    assert not read("prompt_completion", {"prompt": [said("user", "a")], "completion": "b"}).is_plain


def test_of_prompt_and_completion_messages_only_the_completion_is_trained_on():
    prompt = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    completion = [said("assistant", "d"), said("tool", "e"), said("assistant", "f")]
    chat = read("prompt_completion", {"prompt": prompt, "completion": completion})
    assert chat.is_trained == (False, False, False, True, False, True)


def test_roles_are_normalised_in_sharegpt_only():
    refuse_messages(r"messages\[0\]: 'role' is 'human'; wanted one of system", said("human", "a"))
    speeches = [{"from": who, "value": "x"} for who in ("human", "user", "gpt", "bot", "chatbot", "tool")]
    roles = [message["role"] for message in read("sharegpt", {"conversations": speeches}).messages]
    assert roles == ["user", "user", "assistant", "assistant", "assistant", "tool"]
    refuse("sharegpt", {"conversations": [{"from": "Robot", "value": "x"}]}, r"conversations\[0\]: 'from' is 'Robot'")


def test_a_system_text_beside_the_turns_comes_first():
    assert messages(said("user", "a"), system="s").messages[0] == said("system", "s")
    assert messages(said("user", "a"), system="").messages[0] == said("user", "a")
    refuse_messages("message 1 is a system message", said("system", "t"), system="s")
    refuse_messages("system is the number 3; wanted text", said("user", "a"), system=3)


def test_instructions_stand_at_the_beginning():
    assert len(messages(said("system", ""), said("developer", "a"), said("user", "b")).messages) == 3
    refuse_messages("message 1 is a system message; wanted one", said("system", "a"), said("system", "b"))
    refuse_messages("message 1 is a system message", said("user", "a"), said("system", "b"))
    refuse_messages("message 1 is a system message", said("developer", "a"), said("system", "b"))


def test_no_assistant_turn_is_no_error():
    assert messages(said("user", "a")).messages == (said("user", "a"),)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"content": "a"}, "'role' is null"),
        ({"role": "user"}, "'content' is null; wanted text, or a list of text parts"),
        (said("user", 3), "'content' is the number 3"),
        (said("user", None), "'content' is null"),
        (said("user", {"a": 1}), "'content' is an object"),
        (said("user", [{"type": "image", "url": "x"}]), "a part of the content is of type 'image'"),
        (said("user", ["x"]), "a part of the content is 'x'"),
        (said(["user"], "a"), "'role' is a list of 1"),
        ("hello", "found 'hello'; wanted an object with 'role' and 'content'"),
        (said("assistant", None), "'content' is null"),
        (said("user", "a", tool_calls=[CALL]), "a user message has tool_calls"),
        (said("user", "a", thinking="t"), "a user message has reasoning_content"),
        (said("assistant", "a", thinking=3), "reasoning_content is the number 3"),
        (said("assistant", "a", tool_calls="x"), "tool_calls: found 'x', which is not valid JSON"),
        (said("assistant", "a", tool_calls=[{"id": 1}]), "a tool call is an object without a function's name"),
    ],
)
def test_a_turn_that_cannot_be_is_refused_with_its_place(turn, reason):
    refuse_messages(rf"^messages\[1\]: {reason}", said("user", "x"), turn)


@pytest.mark.parametrize(
    ("turns", "what"), [([], "an empty list"), (None, "missing or null"), ("a", "'a'"), ({}, "an o")]
)
def test_turns_that_are_no_list_or_empty_are_refused(turns, what):
    refuse("messages", {"messages": turns}, f"^messages is {what}")


def test_arguments_of_tool_calls_become_objects_and_the_rest_stays():
    in_string = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    bare = {"name": "f", "arguments": {"x": 1}}
    turn = messages(said("assistant", None, tool_calls=[in_string, bare])).messages[0]
    assert turn["content"] == ""
    assert turn["tool_calls"] == [CALL, {"type": "function", "function": bare}]


@pytest.mark.parametrize(
    "arguments", ["", "[1]", "{", '{"a": NaN}', '"\\ud800"', '{"a": "\\ud800"}', "[" * 9999, None, 3]
)
def test_arguments_that_are_no_object_are_refused(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    refuse_messages(r"^messages\[0\]: the arguments of a tool call: found ", said("assistant", "", tool_calls=[call]))


def test_function_calls_of_sharegpt_become_tool_calls():
    value = json.dumps({"name": "f", "arguments": {"x": 1}})
    turn = read("sharegpt", {"conversations": [{"from": "function_call", "value": value}]}).messages[0]
    assert turn == said("assistant", "", tool_calls=[{"type": "function", "function": json.loads(value)}])
    refuse(
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "f(1)"}]},
        r"\[0\]: value: found 'f\(1\)', which",
    )


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_are_a_list_or_its_json(tools):
    assert messages(said("user", "a"), tools=tools).tools == ({"name": "f"},)


@pytest.mark.parametrize("nothing", [None, "", [], "[]"])
def test_no_tools_are_none(nothing):
    assert messages(said("user", "a"), tools=nothing).tools == ()


def test_tools_that_are_something_else_are_refused():
    refuse_messages("tools is the number 3", said("user", "a"), tools=3)
    refuse_messages("tools holds 'f'; wanted objects", said("user", "a"), tools=["f"])
    refuse_messages("tools: found 'f', which is not valid JSON", said("user", "a"), tools="f")


def test_reasoning_is_given_under_both_names_where_the_record_says_thinking():
    assert messages(said("assistant", "a", reasoning_content="t")).messages[0]["reasoning_content"] == "t"
    turn = messages(said("assistant", "a", thinking="t", reasoning_content=None)).messages[0]
    assert turn == said("assistant", "a", thinking="t", reasoning_content="t")


def test_other_fields_of_a_message_are_left_out_and_nulls_are_no_fields():
    turn = said("tool", "a", tool_call_id="c1", name="f", tool_calls=None, thinking=None, id=7)
    assert messages(turn).messages == (said("tool", "a", tool_call_id="c1", name="f"),)


def test_flags_say_which_assistant_messages_may_be_trained_on():
    turns = [
        said("user", "a"),
        said("assistant", "b", train=False),
        said("assistant", "c", weight=1),
        said("assistant", ""),
    ]
    assert messages(*turns).is_trained == (False, False, True, True)
    assert messages(*turns, system="s").is_trained == (False, False, False, True, True)
    assert messages(said("assistant", "a", train=None, weight=0)).is_trained == (False,)
    assert messages(said("user", "a"), said("assistant", "b")).is_trained == ()


@pytest.mark.parametrize("flag", ["no", 0.5, 2, [], float("nan")])
def test_flags_other_than_0_and_1_are_refused(flag):
    refuse_messages("turn 0: train or weight is ", said("assistant", "a", weight=flag))


def test_a_flag_that_wants_a_user_message_trained_on_is_refused():
    refuse_messages("turn 0 is a user message to train on", said("user", "a", train=True))


def test_a_completion_that_begins_with_another_than_the_assistant_is_refused():
    record = {"prompt": "a", "completion": [said("user", "b")]}
    refuse("prompt_completion", record, "completion begins with a user message; wanted the assistant's")


def test_every_seed_task_is_a_chat(real_data):
    lines = (real_data / "self-instruct-seed-tasks.jsonl").read_text("utf-8").splitlines()
    chat = reader("alpaca", {"input": "instances.0.input", "output": "instances.0.output"})
    assert len([chat(json.loads(line)) for line in lines]) == 175
