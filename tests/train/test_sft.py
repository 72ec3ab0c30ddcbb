"""Chats in training: labels, denominators and the loss are those of the targets."""

import json
import math

import numpy as np
import pytest
import small_chats
from small_chats import chat, write_lines

from llmt_prep.config import MixConfig
from llmt_prep.pipeline import build_dataset
from llmt_shared.config import load_config
from llmt_shared.dataset import open_dataset
from llmt_shared.errors import ConfigError
from llmt_train.config import RunConfig
from llmt_train.data.stream import read_batch
from llmt_train.fit import fit

CHATS = [chat(*(f"words {n} " * (n % 5 + 1) for _ in range(2 * (n % 3 + 1)))) for n in range(24)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")

    def pack(kind, records):
        tokenizer = small_chats.save_tokenizer(folder / "tokenizer")
        sources = {"a": {"path": str(write_lines(folder / f"{kind}.jsonl", records))}}
        mix = {"kind": kind, "output": str(folder / kind), "tokenizer": str(tokenizer), "sources": sources}
        mix["sequence"] = {"length": 256}
        build_dataset(MixConfig.model_validate(mix), workers=1)
        return open_dataset(folder / kind)

    return pack("sft", CHATS), pack("preference", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)


def write_run(folder, data, task):
    path = folder / "run.yaml"
    path.write_text(
        f"task: {task}\nmodel: {{from_config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, "
        f"num_hidden_layers: 1, num_attention_heads: 2}}}}\ndata: {data}\noutput: {folder / 'run'}\n"
        "batch: {tokens: 512, micro_rows: 1}\ntrain: {steps: 2}\noptim: {lr: 1e-3}\n"
    )
    return load_config(path, RunConfig)


def test_a_batch_has_the_labels_of_its_rows(packed):
    dataset, _ = packed
    rows = np.array([2, 0, 1])
    batch = read_batch(dataset.train, rows, {})
    wanted = np.concatenate([dataset.train[row].labels for row in rows])
    np.testing.assert_array_equal(batch.labels[0].numpy(), wanted)
    assert int((batch.labels >= 0).sum()) == dataset.train.row_targets.take(rows).sum()


def test_chats_are_trained_on(packed, tmp_path):
    dataset, _ = packed
    fit(write_run(tmp_path, dataset.path, "sft"))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    uniform = math.log(dataset.manifest.tokenizer.vocab_size)  # of a model that knows nothing
    assert abs(logged[0]["loss"] - uniform) < 0.2


@pytest.mark.parametrize(
    ("which", "task", "way_out"), [(0, "pretrain", "`task: sft`"), (1, "sft", "`task: dpo` or `task: orpo`")]
)
def test_a_task_of_another_kind_than_the_data_is_refused(packed, tmp_path, which, task, way_out):
    with pytest.raises(ConfigError, match=f"is of kind .*; set {way_out}"):
        fit(write_run(tmp_path, packed[which].path, task))
