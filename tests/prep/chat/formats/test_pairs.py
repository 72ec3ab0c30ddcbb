"""Preference data to pairs: where prompt and answers part, what of a transcript is kept, which pairs are of no use."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from fuzzed_chats import texts
from hypothesis import given
from hypothesis import strategies as st

from llmt_prep.chat.formats import reader
from llmt_prep.chat.messages import PreferencePair, UnfitPair

EXCERPT = Path(__file__).parents[3] / "data" / "chat" / "hh-rlhf-harmless.jsonl"


def user(content: str) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": content, **more}


def explicit(prompt: object, chosen: object, rejected: object, **beside: object) -> PreferencePair:
    return reader("explicit", {})({"prompt": prompt, "chosen": chosen, "rejected": rejected, **beside})


def implicit(chosen: object, rejected: object) -> PreferencePair:
    return reader("implicit", {})({"chosen": chosen, "rejected": rejected})


def transcript(chosen: str, rejected: str) -> PreferencePair:
    return reader("transcript", {})({"chosen": chosen, "rejected": rejected})


def test_a_side_of_messages_may_repeat_the_prompt_or_not():
    wanted = PreferencePair((user("a"),), (assistant("b"),), (assistant("c"),))
    assert explicit("a", "b", "c") == wanted
    assert explicit([user("a")], [assistant("b")], "c") == wanted
    assert explicit("a", [user("a"), assistant("b")], [user("a"), assistant("c")]) == wanted
    with_system = explicit("a", [user("a"), assistant("b")], [assistant("c")], system="s", tools='[{"name": "f"}]')
    assert with_system == wanted._replace(
        prompt=({"role": "system", "content": "s"}, user("a")), tools=({"name": "f"},)
    )


def test_conversations_part_at_the_first_message_that_differs():
    prompt = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    pair = implicit([*prompt, assistant("d"), user("e"), assistant("f")], [*prompt, assistant("g")])
    assert pair == PreferencePair(tuple(prompt), (assistant("d"), user("e"), assistant("f")), (assistant("g"),))


def test_a_conversation_that_begins_the_other_keeps_its_last_message():
    pair = implicit([user("a"), assistant("b")], [user("a"), assistant("b"), user("c"), assistant("d")])
    assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == (1, 1, 3)


DIFFERING = [
    (implicit, ([user("a"), assistant("b")], [user("x"), assistant("b")])),
    (implicit, ([assistant("a")], [assistant("b")])),
    (implicit, ([user("a"), assistant("b"), user("c")], [user("a"), assistant("b"), user("d"), assistant("e")])),
    (explicit, ("a", [user("x"), assistant("b")], "c")),
    (explicit, ([user("a")], "b", [user("a")])),
    (transcript, ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: x\n\nAssistant: b")),
    (transcript, ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d")),
]
IDENTICAL = [
    (explicit, ("a", "b", "b")),
    (explicit, ("a", "b", [assistant("b")])),
    (implicit, ([user("a"), assistant("b")], [user("a"), assistant("b")])),
    (transcript, ("\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant:")),
    (transcript, ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:b")),
]
EMPTY = [
    (explicit, ("a", "", "b")),
    (explicit, ("a", "b", " \n")),
    (implicit, ([user("a"), assistant("")], [user("a"), assistant("b")])),
    (transcript, ("\n\nHuman: a\n\nAssistant: ", "\n\nHuman: a\n\nAssistant: b")),
]


@pytest.mark.parametrize(
    ("read", "sides", "fault"),
    [(*case, "differing_prompts") for case in DIFFERING]
    + [(*case, "identical_sides") for case in IDENTICAL]
    + [(*case, "empty_answer") for case in EMPTY],
)
def test_a_pair_of_no_use_says_which_fault_it_has(read, sides, fault):
    with pytest.raises(UnfitPair) as unfit:
        read(*sides)
    assert unfit.value.fault == fault


def test_an_answer_that_only_calls_a_tool_is_not_empty():
    calls = [{"function": {"name": "f", "arguments": {}}}]
    assert explicit("a", [assistant("", tool_calls=calls)], "b").chosen[0]["tool_calls"] == calls


def test_an_instruction_inside_a_side_is_refused():
    with pytest.raises(ValueError, match="message 2 is a system message"):
        explicit("a", [assistant("b"), {"role": "system", "content": "s"}], "c")


contents = texts.filter(lambda text: "\n\nHuman:" not in text and "\n\nAssistant:" not in text)
turns = st.lists(st.tuples(st.sampled_from(["Human", "Assistant"]), contents), min_size=1, max_size=4)
answers = st.lists(contents.filter(str.strip), min_size=2, max_size=2, unique=True)


@given(turns, answers)
def test_a_transcript_is_its_marks_and_contents_byte_for_byte(prompt, answers):
    chosen, rejected = answers
    before = "".join(f"\n\n{speaker}: {text}" for speaker, text in prompt)
    pair = transcript(f"{before}\n\nAssistant: {chosen}", f"{before}\n\nAssistant: {rejected}")
    roles = {"Human": "user", "Assistant": "assistant"}
    assert [(turn["role"], turn["content"]) for turn in pair.prompt] == [(roles[who], text) for who, text in prompt]
    assert (pair.chosen, pair.rejected) == ((assistant(chosen),), (assistant(rejected),))


def test_one_space_after_a_mark_is_no_content_and_all_other_white_space_is():
    pair = transcript("\n\nHuman:  a \n\n\nAssistant:b \n", "\n\nHuman:  a \n\n\nAssistant: c")
    assert pair.prompt == (user(" a \n"),)
    assert pair.chosen == (assistant("b \n"),)


def test_a_mark_inside_a_line_is_content():
    pair = transcript("\n\nHuman: a Human: b\n\nAssistant: c\nHuman: d", "\n\nHuman: a Human: b\n\nAssistant: e")
    assert pair.prompt[0]["content"] == "a Human: b"
    assert pair.chosen[0]["content"] == "c\nHuman: d"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Human: a\n\nAssistant: b", "chosen begins with 'Human: a"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "chosen ends with a turn of Human"),
        ("\n\nHuman: a", "chosen ends with a turn of Human"),
        ("\n\nAssistant: a", "chosen has no turn before the assistant's"),
        (None, "chosen is missing or null; wanted text"),
        ("", "chosen begins with ''"),
    ],
)
def test_a_transcript_without_a_prompt_and_a_last_answer_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        transcript(text, "\n\nHuman: a\n\nAssistant: c")


def outcomes(lines: list[str]) -> Counter[str]:
    read, counts = reader("transcript", {}), Counter[str]()
    for line in lines:
        try:
            read(json.loads(line))
            counts["pair"] += 1
        except UnfitPair as unfit:
            counts[unfit.fault] += 1
    return counts


def test_every_pair_of_the_excerpt_is_read():
    lines = EXCERPT.read_text("utf-8").split("\n")[:-1]
    assert len(lines) >= 300
    assert outcomes(lines) == {"pair": len(lines)}


def test_every_real_pair_is_read_or_counted(real_data):
    with gzip.open(real_data / "hh-rlhf-harmless-test.jsonl.gz", "rt", encoding="utf-8") as file:
        assert outcomes(list(file)) == {"pair": 2303, "differing_prompts": 5, "empty_answer": 4}
