"""Statistics of targets: against lists of lengths, row by row."""

import numpy as np
import pytest
import small_chats
from hypothesis import given
from hypothesis import strategies as st
from small_chats import chat, write_lines

from llmt_prep.config import MixConfig
from llmt_prep.lengths import QUANTILES, counts_to_lengths
from llmt_prep.pipeline import build_dataset
from llmt_prep.stats import dataset_stats
from llmt_prep.target_stats import target_stats
from llmt_shared.dataset import open_dataset

CHATS = [chat(*("word " * (n * k % 9) for k in range(2 * (n % 4 + 1)))) for n in range(60)]
PAIRS = [
    {"prompt": "why " * (n % 9 + 1), "chosen": "yes " * (n % 5 + 1), "rejected": "no " * (n % 7 + 1)} for n in range(60)
]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tokenizer = small_chats.save_tokenizer(folder / "tokenizer")
    found = {}
    for kind, records, overflow in (("sft", CHATS, "truncate"), ("preference", PAIRS, "truncate_prompt")):
        path = write_lines(folder / f"{kind}.jsonl", records)
        mix = {
            "kind": kind, "output": str(folder / kind), "tokenizer": str(tokenizer),
            "sequence": {"length": 90, "overflow": overflow}, "sources": {"a": {"path": str(path)}},
        }  # fmt: skip
        build_dataset(MixConfig.model_validate(mix), workers=1)
        found[kind] = open_dataset(folder / kind)
    return found


def quantiles(lengths):
    ordered = sorted(lengths)
    return {name: ordered[max(0, int(np.ceil(q * len(ordered))) - 1)] for name, q in QUANTILES.items()}


def trained(dataset):
    control = np.array([0, 1, dataset.manifest.tokenizer.eos_id])
    return target_stats(dataset.train, control, has_pairs=dataset.manifest.kind == "preference")


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_spans_are_counted_one_by_one(datasets, kind):
    dataset, lengths, ends = datasets[kind], [], 0
    for number in range(len(dataset.train)):
        row = dataset.train[number]
        lengths += row.spans.length.tolist()
        ends += int((row.tokens[row.spans.start + row.spans.length - 1] == dataset.manifest.tokenizer.eos_id).sum())
    found, split = trained(dataset), dataset.manifest.splits["train"]
    assert found.spans == len(lengths) == split.spans
    assert found.share == split.targets / split.tokens
    assert found.ends_turn == ends / len(lengths)
    assert ends < len(lengths) or kind == "preference"  # truncating takes ends away
    assert quantiles(lengths) == {name: getattr(found.lengths, name) for name in QUANTILES}


def test_pairs_are_counted_one_by_one(datasets):
    dataset, prompts, sides = datasets["preference"], [], ([], [])
    for number in range(len(dataset.train)):
        row, starts = dataset.train[number], [0]
        for place, length in enumerate(row.segments.length.tolist()):
            sides[place % 2].append(length)
            starts.append(starts[-1] + length)
        for start in starts[:-1:2]:
            prompts.append(int(row.spans.start[row.spans.start >= start][0]) - start)
    found = trained(dataset).pairs
    assert found.pairs == len(prompts) == dataset.manifest.splits["train"].pairs
    for mine, wanted in ((found.prompt, prompts), (found.chosen, sides[0]), (found.rejected, sides[1])):
        assert quantiles(wanted) == {name: getattr(mine, name) for name in QUANTILES}
        assert mine.max == max(wanted)


def test_documents_of_pairs_are_pairs_though_their_prompts_are_cut(datasets):
    dataset = datasets["preference"]
    stats = dataset_stats(dataset)
    assert any(dataset.train[n].segments.offset[0] for n in range(len(dataset.train)))
    assert stats.splits["train"].documents == dataset.manifest.splits["train"].pairs


@given(st.lists(st.integers(1, 40), min_size=1))
def test_lengths_are_summarized_from_their_counts(lengths):
    found = counts_to_lengths(np.bincount(lengths, minlength=41))
    assert {name: getattr(found, name) for name in QUANTILES} == quantiles(lengths)
    assert sum(found.histogram) == len(lengths)
    assert found.histogram == tuple(sum(1 for n in lengths if n.bit_length() == bits) for bits in range(1, 7))
