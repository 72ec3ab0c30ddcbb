"""The documents that a bad step is to blame on are the ones that are named."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_datasets
import torch
from train.interrupted import curve, interrupt
from train.tiny_dataset import WORDS, write_dataset

from llmt_shared.dataset import open_dataset
from llmt_shared.errors import DataError
from llmt_train import fit as fit_module
from llmt_train.config import RunConfig
from llmt_train.data.stream import count, read_batch, rows_of_step
from llmt_train.fit import fit
from llmt_train.module import StepPart
from llmt_train.setup import open_data, set_up
from llmt_train.watch.blame import describe_spike
from llmt_train.watch.metrics import read_metrics
from llmt_train.watch.spikes import Usual

pytestmark = pytest.mark.usefixtures("process_group")

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
BAD_STEP = 50


def make_config(data: Path, output: Path, **changes: Any) -> RunConfig:
    settings = {
        "task": "pretrain", "model": {"from_config": LLAMA}, "data": data, "output": output,
        "batch": {"tokens": 8 * 16, "micro_rows": 3}, "train": {"steps": 60, "seed": 3},
        "optim": {"lr": 1e-2, "warmup": "20%"}, "save": {"every": 10, "keep": 1},
    }  # fmt: skip
    return RunConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A dataset in which words follow one another but for one document, its row and its number."""
    data = write_dataset(tmp_path_factory.mktemp("data") / "tiny", num_rows=480, validation_rows=0)
    _, plan = open_data(make_config(data, data.parent / "run"))
    row = int(rows_of_step(plan, BAD_STEP - 1)[4])
    table = open_dataset(data).train.segments([row])
    segment = int(table.length.argmax())
    first = int(table.length[:segment].sum())
    path = data / "train/tokens/c/0/0"
    tokens = np.frombuffer(path.read_bytes()[:-4], np.uint16).reshape(480, 16).copy()
    part = tokens[row, first : first + int(table.length[segment])]
    part[:] = (20 - 3 * np.arange(len(part))) % WORDS
    path.write_bytes(tokens.tobytes() + bytes(4))
    return data, row, int(table.document[segment])


def spikes(output: Path) -> dict[int, dict[str, Any]]:
    return {record["step"]: record["spike"] for record in read_metrics(output) if "spike" in record}


@pytest.fixture(scope="module")
def whole(spoiled: tuple[Path, int, int]) -> Path:
    """The output of an uninterrupted run."""
    output = spoiled[0].parent / "whole"
    fit(make_config(spoiled[0], output))
    return output


def test_the_one_bad_document_is_named(spoiled, whole):
    data, row, document = spoiled
    (step, spike), *more = spikes(whole).items()
    assert (step, more, len(spike["pieces"])) == (BAD_STEP, [], 1)
    worst = spike["pieces"][0]
    source = open_dataset(data).sources[document % 2]
    assert (worst["row"], worst["document"]) == (row, f"{source}:{document}")
    assert worst["loss"] > 2 * spike["limit"] > 2 * spike["usual"]
    warning = next(line for line in (whole / "run.log").read_text().splitlines() if "warning: " in line)
    loss = next(record["loss"] for record in read_metrics(whole) if record["step"] == step)
    assert f"step {step}: the loss is {loss:.4f}, where {spike['usual']:.4f} was usual" in warning
    assert f"row {row}, {source}:{document}: loss" in warning
    assert f"`llmt-prep inspect {data} --row {row}` shows it" in warning


def test_the_share_of_a_piece_is_that_of_the_steps_loss(spoiled, whole):
    """From the tokens: loss of the piece x its targets / (loss of the step x all targets)."""
    data, row, document = spoiled
    dataset, plan = open_data(make_config(data, whole))
    record = next(record for record in read_metrics(whole) if record["step"] == BAD_STEP)
    worst, table = record["spike"]["pieces"][0], dataset.train.segments([row])
    targets = int(table.length[table.document == document][0]) - 1
    total = int(dataset.train.row_targets.take(rows_of_step(plan, BAD_STEP - 1)).sum())
    assert worst["share"] == pytest.approx(worst["loss"] * targets / (record["loss"] * total), abs=2e-4)


@pytest.mark.parametrize("step", [45, BAD_STEP])
def test_a_resumed_run_warns_at_the_same_steps(spoiled, whole, tmp_path, step):
    config = make_config(spoiled[0], tmp_path / "run")
    interrupt(config, step)
    assert fit(config).resumed_from is not None
    assert BAD_STEP in spikes(tmp_path / "run")
    assert curve(tmp_path / "run") == curve(whole)


def test_a_run_without_bad_documents_has_no_spikes(tmp_path, capsys):
    data = write_dataset(tmp_path / "data", num_rows=480, validation_rows=0)
    fit(make_config(data, tmp_path / "run"))
    assert spikes(tmp_path / "run") == {}
    assert "warning" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    text = small_datasets.build(folder / "text")
    return {"pretrain": text} | {k: small_datasets.build_chats(folder / k, k) for k in ("sft", "preference")}


class Poisoned(fit_module.TrainModule):
    """At the third step, the second micro-batch's second segment of a loss has a NaN in it."""

    named: tuple[str, int, int] | None = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step != 2 or len(self.step_parts) != 2:
            return loss
        place = int(np.flatnonzero(self.step_parts[-1].by_piece.numpy())[1])
        self.step_parts[-1].by_piece[place] = math.nan
        self.step_parts[-1].measures["loss"] += math.nan
        return loss * math.nan


@pytest.mark.parametrize(("task", "kind"), [("pretrain", "pretrain"), ("sft", "sft"), ("orpo", "preference")])
def test_the_document_with_a_loss_that_is_not_finite_is_named_with_its_file(packed, tmp_path, monkeypatch, task, kind):
    """By the file and record that packing says, found by a walk of its own over the step's rows."""
    from llmt_prep.companions import place_of, read_files

    data = packed[kind]
    length = open_dataset(data).manifest.length
    config = make_config(data, tmp_path / "run", task=task, batch={"tokens": 5 * length, "micro_rows": 2})
    dataset, plan = open_data(config)
    monkeypatch.setattr(fit_module, "TrainModule", Poisoned)
    with pytest.raises(DataError) as caught:
        fit(config)

    rows = rows_of_step(plan, 2)[2:4].tolist()
    found = []
    for row in rows:
        table, pairs = dataset.train.segments([row]), dataset.train.pairs([row])
        candidates = range(len(table.length)) if pairs is None else pairs.segments[:, 0].tolist()
        found += [(row, int(table.source[each]), int(table.document[each])) for each in candidates]
    row, source, document = found[1]
    place = place_of(read_files(data), document)
    named = f"{dataset.sources[source]}:{document} ({place.path} record {place.record})"
    message = str(caught.value)
    assert f"step 3: the loss is nan; stopped before it reached the weights. Rows {row}; documents {named}." in message
    assert f"`llmt-prep inspect {data} --row {row}` shows it" in message
    assert f"error: {message}" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize(("task", "kind"), [("sft", "sft"), ("orpo", "preference")])
def test_a_piece_is_bad_by_what_its_own_targets_or_pairs_lose(packed, tmp_path, task, kind):
    """Every target, or pair, has the usual loss but for those of one piece: a short one, so that others add more."""
    data = packed[kind]
    config = make_config(data, tmp_path / "run", task=task, batch={"tokens": 4 * open_dataset(data).manifest.length})
    setup = set_up(config)
    rows = rows_of_step(setup.plan, 1)
    counts = count(setup.dataset.train, rows)
    parts, numbers = [], []
    for row in rows.tolist():
        batch = read_batch(setup.dataset.train, np.array([row]), counts)
        in_loss = batch.pairs[:, 0] if batch.pairs is not None else batch.segment_ids_flat.long()[batch.label_places]
        per = "targets" if batch.pairs is None else "pairs"
        weights = torch.bincount(in_loss, minlength=len(batch.lengths)) / counts[per]
        parts.append(StepPart({"loss": 2.0 * weights.sum()}, 2.0 * weights.double()))
        numbers += [(row, each, float(weights[each])) for each in np.flatnonzero(weights.numpy())]
    row, piece, weight = min(numbers, key=lambda number: number[2])
    parts[rows.tolist().index(row)].by_piece[piece] *= 6
    spike = describe_spike(setup, 2, 2.0 + 10.0 * weight, Usual(2.0, 2.5), parts)
    worst = spike["pieces"][0]
    assert (worst["row"], worst["loss"]) == (row, 12.0)
    assert worst["share"] == pytest.approx(12.0 * weight / (2.0 + 10.0 * weight), abs=1e-4)
    assert worst["document"] == f"one:{int(setup.dataset.train.segments([row]).document[piece])}"
    assert len(spike["pieces"]) == 1  # the others raise nothing


def test_without_pyarrow_the_document_is_named_by_its_number(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "TrainModule", Poisoned)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    data = packed["pretrain"]
    config = make_config(data, tmp_path / "run", batch={"tokens": 5 * small_datasets.LENGTH, "micro_rows": 2})
    with pytest.raises(DataError, match=r"documents (web|code|notes):\d+\. "):
        fit(config)


def test_where_no_document_is_to_blame_those_of_the_step_are_named(packed, tmp_path, monkeypatch):
    """The loss is finite, but not the norm of its gradient."""

    class Endless(fit_module.TrainModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * math.inf

    monkeypatch.setattr(fit_module, "TrainModule", Endless)
    data = packed["pretrain"]
    config = make_config(data, tmp_path / "run", batch={"tokens": 12 * small_datasets.LENGTH, "micro_rows": 2})
    _, plan = open_data(config)
    rows = rows_of_step(plan, 0).tolist()
    with pytest.raises(DataError) as caught:
        fit(config)
    message = str(caught.value)
    assert "but the norm of its gradient nan" in message or "but the norm of its gradient inf" in message
    assert f"Rows {', '.join(map(str, rows[:8]))} and 4 more; documents " in message


def test_synthetic_rows_are_named_but_lie_nowhere_to_be_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "TrainModule", Poisoned)
    rows = {"synthetic": {"length": 64, "median": 8, "vocab_size": 50}}
    with pytest.raises(DataError, match=r"step 3: the loss is nan.* Rows \d+; documents \w+:\d+\. A lower") as caught:
        fit(make_config(rows, tmp_path / "run", batch={"tokens": 320, "micro_rows": 2}))
    assert "inspect" not in str(caught.value)


def test_a_file_name_cannot_steer_a_terminal(spoiled, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = small_datasets.copy(spoiled[0], tmp_path / "copy")
    columns = {"path": pa.array(["\x1b[31m/data.jsonl"]), "first_document": pa.array([0], pa.uint64())}
    pq.write_table(pa.table(columns), data / "files.parquet")
    fit(make_config(data, tmp_path / "run"))
    assert f"(\\x1b[31m/data.jsonl record {spoiled[2]})" in capsys.readouterr().err
    piece = spikes(tmp_path / "run")[BAD_STEP]["pieces"][0]
    assert (piece["file"], piece["record"]) == ("\x1b[31m/data.jsonl", spoiled[2])
    json.dumps(piece)
