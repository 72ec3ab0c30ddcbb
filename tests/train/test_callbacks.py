"""The parts around a step: the metrics file, the progress shown, stopping, the evaluation."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from llmt_train import progress
from llmt_train.metrics import MetricsFile, read_metrics
from llmt_train.progress import Reporter
from llmt_train.stopping import StopRequest

STEP = {"step": 1, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 1234.5}
EVALUATION = {"step": 0, "eval": {"loss": 3.0, "targets": 5, "sources": {"web[x]": {"loss": 3.0, "targets": 5}}}}


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


def report(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> tuple[Reporter, io.StringIO]:
    stream = io.StringIO()

    def console(**options: object) -> Console:
        assert options.pop("file") is sys.stderr
        return Console(file=stream, force_terminal=terminal, width=150, **options)

    monkeypatch.setattr(progress, "Console", console)
    return Reporter(10, 0), stream


def test_off_a_terminal_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, stream = report(monkeypatch, terminal=False)
    reporter.evaluation(EVALUATION)
    for step in range(1, 11):
        reporter.step(STEP | {"step": step})
    reporter.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 0/10  held out: loss 3.0000  (web[x] 3.0000)"
    assert lines[1].startswith("step 1/10  loss 2.5000  lr 1.00e-03  1,234 tokens/s  ETA ")
    assert lines[2].startswith("step 10/10")  # the last one always, those between only every few seconds
    assert len(lines) == 3
    assert "\x1b" not in stream.getvalue()


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, stream = report(monkeypatch, terminal=True)
    reporter.step(STEP)
    reporter.evaluation(EVALUATION)
    reporter.close()
    assert "1/10" in stream.getvalue()
    assert "loss 2.5000" in stream.getvalue()
    assert "held out: loss 3.0000" in stream.getvalue()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal_name is None
        os.kill(os.getpid(), number)
        assert stop.signal_name == number.name
    assert signal.getsignal(number) == before
    assert "saving" in capfd.readouterr().err


def test_a_second_interrupt_leaves_at_once_with_130() -> None:
    program = (
        "import time; from llmt_train.stopping import StopRequest\n"
        "with StopRequest(): print('on', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
