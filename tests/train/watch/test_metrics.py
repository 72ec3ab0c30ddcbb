"""metrics.jsonl is one clean curve, however often a run was resumed."""

import json
from pathlib import Path

from llmt_train.watch.metrics import MetricsFile, read_metrics


def write_lines(directory: Path, steps: list[int], tail: str = "") -> None:
    text = "".join(json.dumps({"step": step, "loss": 0.1 * step}) + "\n" for step in steps)
    (directory / "metrics.jsonl").write_text(text + tail)


def test_every_line_is_visible_at_once(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.write({"step": 1, "loss": 0.1})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.1}]
    metrics.sync()
    metrics.close()


def test_a_resumed_run_cuts_off_what_lies_beyond_its_checkpoint(tmp_path: Path) -> None:
    write_lines(tmp_path, [0, 1, 2, 3, 4])
    metrics = MetricsFile(tmp_path, 2)
    metrics.write({"step": 3, "loss": 7.0})
    metrics.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert read_metrics(tmp_path)[-1]["loss"] == 7.0


def test_floats_survive_the_cut_bit_for_bit(tmp_path: Path) -> None:
    write_lines(tmp_path, [1, 2, 3])
    before = read_metrics(tmp_path)
    MetricsFile(tmp_path, 3).close()
    assert read_metrics(tmp_path) == before


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    write_lines(tmp_path, [1, 2], tail='{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    MetricsFile(tmp_path, 3).close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_run_from_the_start_has_an_empty_curve(tmp_path: Path) -> None:
    write_lines(tmp_path, [0, 1])
    MetricsFile(tmp_path, 0).close()
    assert read_metrics(tmp_path) == []


def test_another_file_of_steps_is_cut_in_the_same_way(tmp_path: Path) -> None:
    write_lines(tmp_path, [0, 1, 2])
    (tmp_path / "metrics.jsonl").rename(tmp_path / "samples.jsonl")
    MetricsFile(tmp_path, 1, "samples.jsonl").close()
    assert [record["step"] for record in read_metrics(tmp_path, "samples.jsonl")] == [0, 1]
    assert read_metrics(tmp_path) == []
