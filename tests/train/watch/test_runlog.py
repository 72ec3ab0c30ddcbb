"""run.log: what a person saw of a run."""

import re
import socket
import warnings
from pathlib import Path

import pytest
import torch
from train.tiny_dataset import WORDS, write_dataset

from llmt_shared.errors import ConfigError, DataError, Stopped
from llmt_shared.progress import say, silent
from llmt_train.config import RunConfig
from llmt_train.fit import fit
from llmt_train.watch import progress
from llmt_train.watch.runlog import RunLog, add_line

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"


def messages(folder: Path) -> list[str]:
    """The log's messages without their times."""
    text = (folder / "run.log").read_text()
    first, *parts = re.split(rf"^{TIME}  ", text, flags=re.M)
    assert first == ""
    return [part.rstrip("\n") for part in parts]


def test_what_is_said_before_it_opens_is_kept_too(tmp_path):
    with RunLog() as log:
        say("one\nline two")
        log.open(tmp_path)
        say("three")
    say("four")
    header, *rest = messages(tmp_path)
    assert rest == ["one\nline two", "three"]
    assert header.startswith(f"start on {socket.gethostname()}: python 3.")
    assert f"torch {torch.__version__}, lightning " in header


def test_every_start_is_appended_with_its_header(tmp_path):
    for text in ("one", "two"):
        with RunLog() as log:
            log.open(tmp_path)
            say(text)
    assert [message.split(" ")[0] for message in messages(tmp_path)] == ["start", "one", "start", "two"]


def test_warnings_are_kept_and_shown_as_ever(tmp_path):
    shown = warnings.showwarning

    def warn() -> None:
        with RunLog() as log:
            log.open(tmp_path)
            warnings.warn("mind this", RuntimeWarning, stacklevel=1)

    with pytest.warns(RuntimeWarning, match="mind this"):
        warn()
    assert messages(tmp_path)[1:] == ["warning: RuntimeWarning: mind this"]
    assert warnings.showwarning is shown


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DataError("the loss is nan"), "error: the loss is nan"),
        (Stopped("saved at step 3"), "stopped: saved at step 3"),
        (ZeroDivisionError("oh"), "ZeroDivisionError: oh"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_the_error_that_ends_it_is_kept(tmp_path, error, text):
    def end() -> None:
        with RunLog() as log:
            log.open(tmp_path)
            raise error

    with pytest.raises(type(error)):
        end()
    last = messages(tmp_path)[-1]
    assert last.endswith(text)
    assert ("Traceback" in last) == isinstance(error, ZeroDivisionError | KeyboardInterrupt)


def test_a_log_that_was_never_opened_leaves_nothing(tmp_path):
    def refuse() -> None:
        with RunLog():
            say("one")
            raise ConfigError("refused")

    with pytest.raises(ConfigError):
        refuse()
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "run.log").symlink_to("/dev/full")
    with RunLog() as log:
        log.open(tmp_path)
        say("one \ud800")  # what a file's name may hold


def make_config(folder: Path, **changes) -> RunConfig:
    settings = {
        "task": "pretrain", "data": folder / "data", "output": folder / "run",
        "model": {"from_config": {"model_type": "llama", "vocab_size": WORDS, "hidden_size": 16,
                                  "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}},
        "batch": {"tokens": 32}, "train": {"steps": 3}, "optim": {"lr": 1e-2}, "eval": {"every": 2},
    }  # fmt: skip
    return RunConfig.model_validate(settings | changes)


def test_a_run_keeps_its_lines_and_no_codes_of_a_terminal(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what is no terminal for one
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    fit(make_config(tmp_path))
    found = messages(tmp_path / "run")
    assert [re.sub("  .*", "", message, flags=re.S) for message in found[2:]] == [
        "step 0/3", "step 1/3", "step 2/3", "step 2/3", "step 3/3", "step 3/3",
    ]  # fmt: skip
    assert found[0].startswith("start on ")
    assert found[1].startswith("model     llama")
    assert "\x1b" not in (tmp_path / "run" / "run.log").read_text()


def test_a_resumed_run_appends_and_force_starts_over(tmp_path):
    write_dataset(tmp_path / "data")
    fit(make_config(tmp_path))
    fit(make_config(tmp_path, train={"steps": 5}))
    starts = [message for message in messages(tmp_path / "run") if message.startswith("start on")]
    assert len(starts) == 2
    assert any("resuming  after step 3" in message for message in messages(tmp_path / "run"))
    fit(make_config(tmp_path, train={"steps": 1}), force=True)
    assert sum(message.startswith("start on") for message in messages(tmp_path / "run")) == 1


def test_a_line_is_added_to_a_log_that_is_there(tmp_path):
    with RunLog() as log:
        log.open(tmp_path)
    add_line(tmp_path, "error: of a worker")
    assert messages(tmp_path)[1:] == ["error: of a worker"]


def test_a_run_that_began_no_log_gets_none(tmp_path):
    add_line(tmp_path, "error: of a worker")
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_silent_writes_no_log(tmp_path):
    with silent(), RunLog() as log:
        log.open(tmp_path)
        say("one")
    assert list(tmp_path.iterdir()) == []
