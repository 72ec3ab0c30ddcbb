"""Records of every chat format, whole and spoiled: what a reader must either read or refuse with a reason."""

import json
from typing import Any

from hypothesis import strategies as st

ROLES = ("system", "developer", "user", "assistant", "tool")

texts = st.text(max_size=12) | st.sampled_from(["", " ", "\n\nHuman:", "\n\nAssistant: x", "  a \n", "\r\n", "é\u0301"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)

_arguments = st.dictionaries(texts, scalars, max_size=2)
_calls = st.builds(
    lambda name, arguments, is_text, is_bare: (
        {"name": name, "arguments": json.dumps(arguments) if is_text else arguments}
        if is_bare
        else {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
    ),
    texts, _arguments, st.booleans(), st.booleans(),
)  # fmt: skip
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant") * 5 + ROLES), "content": texts},
    optional={"reasoning_content": texts, "thinking": texts, "name": texts, "train": st.booleans(), "extra": scalars},
)
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts},
    optional={"tool_calls": st.lists(_calls, max_size=2), "weight": st.sampled_from([0, 1, 0.0, None])},
)
asked = st.fixed_dictionaries({"role": st.just("user"), "content": texts})
turns = st.lists(asked | answers | messages, max_size=5)
speeches = st.lists(
    st.fixed_dictionaries(
        {"from": st.sampled_from(["human", "gpt", "system", "tool", "function_call", "user"]), "value": texts}
    ),
    max_size=5,
)
transcripts = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:"]) | texts, max_size=8).map("".join)
_sides = texts | turns | transcripts
_transcripts_of_pairs = st.builds(
    lambda prompt, sides: {name: f"\n\nHuman: {prompt}\n\nAssistant:{side}" for name, side in sides.items()},
    transcripts, st.fixed_dictionaries({"chosen": texts, "rejected": texts}),
)  # fmt: skip
_conversations_of_pairs = st.builds(
    lambda prompt, chosen, rejected: {"chosen": [*prompt, *chosen], "rejected": [*prompt, *rejected]},
    turns | asked.map(lambda turn: [turn]), answers.map(lambda turn: [turn]) | turns, answers.map(lambda turn: [turn]),
)  # fmt: skip

_mixed_records = st.fixed_dictionaries(
    {},
    optional={
        "messages": turns, "conversations": speeches, "instruction": texts, "input": texts, "output": texts,
        "history": st.lists(st.lists(texts, min_size=2, max_size=2), max_size=2), "system": texts,
        "prompt": _sides, "completion": _sides, "chosen": _sides, "rejected": _sides,
        "tools": st.lists(_arguments, max_size=2) | st.lists(_arguments, max_size=2).map(json.dumps),
    },
)  # fmt: skip


whole_records: st.SearchStrategy[dict[str, Any]] = st.one_of(
    _mixed_records, _conversations_of_pairs, _transcripts_of_pairs
).map(lambda record: json.loads(json.dumps(record)))  # a message of both sides would else be spoiled on both


@st.composite
def spoiled_records(draw: st.DrawFn) -> dict[str, Any]:
    """A record, one place of which, at any depth, holds something else."""
    record = draw(whole_records)
    node: Any = record
    while isinstance(node, (dict, list)) and node:
        place = draw(st.sampled_from(sorted(node, key=str) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[place], (dict, list)) or not node[place] or draw(st.booleans()):
            node[place] = draw(json_values)
            break
        node = node[place]
    return record


records = whole_records | spoiled_records() | json_values
