"""What a person sees of a running training."""

import io
import re
import sys

import pytest
from rich.console import Console

from llmt_shared.progress import kept_by
from llmt_train.watch import progress
from llmt_train.watch.progress import Reporter

STEP = {"step": 1, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 1234.5}
EVALUATION = {"step": 0, "eval": {"loss": 3.0, "targets": 5, "sources": {"web[x]": {"loss": 3.0, "targets": 5}}}}


def report(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, width: int = 150) -> tuple[Reporter, io.StringIO]:
    stream = io.StringIO()

    def console(**options: object) -> Console:
        assert options.pop("file") is sys.stderr
        return Console(file=stream, force_terminal=terminal, width=width, **options)

    monkeypatch.setattr(progress, "Console", console)
    return Reporter(10, 0), stream


def shown(record: dict, capsys: pytest.CaptureFixture[str]) -> str:
    Reporter(10, 0).step(STEP | record)
    return capsys.readouterr().err


def test_off_a_terminal_there_are_plain_lines(monkeypatch, capsys) -> None:
    reporter, stream = report(monkeypatch, terminal=False)
    reporter.evaluation(EVALUATION)
    for step in range(1, 11):
        reporter.step(STEP | {"step": step})
    reporter.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 0/10  held out: loss 3.0000  (web[x] 3.0000)"
    assert lines[1].startswith("step 1/10  loss 2.5000  lr 1.00e-03  1,234 tokens/s  ETA ")
    assert lines[2].startswith("step 10/10")  # the last one always, those between only every few seconds
    assert len(lines) == 3
    assert stream.getvalue() == ""


def test_on_a_terminal_there_is_a_bar(monkeypatch) -> None:
    reporter, stream = report(monkeypatch, terminal=True)
    reporter.step(STEP)
    reporter.evaluation(EVALUATION)
    reporter.note("a [b]note[/b] :smile:")
    reporter.close()
    assert "1/10" in stream.getvalue()
    assert "loss 2.5000" in stream.getvalue()
    assert "held out: loss 3.0000  (web[x] 3.0000)" in stream.getvalue()
    assert "a [b]note[/b] :smile:" in stream.getvalue()


@pytest.mark.parametrize(
    ("width", "beside"),
    [
        (80, "loss 2.5000  1,234 tokens/s  MFU 41.0%"),
        (90, "loss 2.5000  1,234 tokens/s  MFU 41.0%"),
        (100, "loss 2.5000  1,234 tokens/s  MFU 41.0%  waiting for data 30%"),
        (120, "loss 2.5000  1,234 tokens/s  MFU 41.0%  waiting for data 30%  lr 1.00e-03"),
    ],
)
def test_the_bar_is_one_line_that_shows_what_there_is_room_for(monkeypatch, width, beside) -> None:
    reporter, stream = report(monkeypatch, terminal=True, width=width)
    reporter.step(STEP | {"mfu": 0.41, "data_wait": 0.3})
    reporter.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").splitlines()
    assert re.fullmatch(rf" *1/10 .* {re.escape(beside)} ETA [-:0-9]+ *", shown[-1])
    assert len(shown[-1]) <= width


@pytest.mark.parametrize("terminal", [True, False])
def test_the_log_has_the_plain_lines_either_way(monkeypatch, terminal) -> None:
    lines: list[str] = []
    reporter, _ = report(monkeypatch, terminal=terminal)
    with kept_by(lines.append):
        for step in range(1, 11):
            reporter.step(STEP | {"step": step})
        reporter.note("a note")
    reporter.close()
    assert [line.split("  ")[0] for line in lines] == ["step 1/10", "step 10/10", "a note"]
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"accuracy": 0.75, "margin": 0.1234, "rewards_chosen": 9.9}, "loss 2.5000  accuracy 0.750  margin 0.123  lr"),
        ({"accuracy": 0.75, "log_odds": -0.5, "nll": 9.9}, "loss 2.5000  accuracy 0.750  log odds -0.500  lr"),
        ({"mfu": 0.4212, "data_wait": 0.01}, "tokens/s  MFU 42.1%  ETA"),
        ({"tflops": 0.4212, "data_wait": 0.3}, "tokens/s  waiting for data 30%  ETA"),
    ],
)
def test_what_says_most_is_shown(record, text, capsys) -> None:
    assert text in shown(record, capsys)


def test_an_evaluation_shows_what_its_objective_measures(capsys) -> None:
    result = {"loss": 0.6, "accuracy": 0.7, "sources": {"one": {"loss": 0.6}}}
    Reporter(10, 0).evaluation({"step": 4, "eval": result})
    assert capsys.readouterr().err == "step 4/10  held out: loss 0.6000  accuracy 0.700  (one 0.6000)\n"
