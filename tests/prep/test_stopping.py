"""A run that is asked to stop ends in order, says how to go on, and goes on to the same dataset."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llmt_prep import pipeline
from llmt_prep.config import MixConfig
from llmt_prep.pipeline import Built, build_dataset, dry_run
from llmt_prep.stopping import START_AGAIN, stoppable
from llmt_shared import durable
from llmt_shared.errors import Stopped


def build(mix: dict[str, Any]) -> Built:
    """Pack in this process, as the command does."""
    with stoppable():
        return build_dataset(MixConfig.model_validate(mix), workers=1)


def signal_to_me(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def run_stoppable(block: Callable[[], None]) -> None:
    with stoppable():
        block()


def test_a_signal_at_any_write_stops_with_4_and_the_rest_is_done_later(
    mix: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = build(mix | {"output": mix["output"] + "2", "cache": mix["output"] + "-cache"}).digest
    really, writes = durable.writing, [0]

    def writing(path: Path) -> Any:
        writes[0] -= 1
        if writes[0] == 0:
            signal_to_me()
        return really(path)

    monkeypatch.setattr(durable, "writing", writing)
    stops = 0
    while not Path(mix["output"]).exists():
        writes[0] = 1 + 6 * stops  # later each time: what was written stays, but the finishing pass begins anew
        stops += 1
        with suppress(Stopped):
            assert build(mix).digest == reference
    assert stops > 3
    assert not Path(mix["output"] + ".staging").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_code_that_catches_exceptions_does_not_catch_a_stop(number: int) -> None:
    def block() -> None:
        try:
            signal_to_me(number)
        except Exception:
            pytest.fail("a stop was taken for a failure of the block")

    message = f"by {signal.Signals(number).name}; nothing is lost: run the same command again"
    with pytest.raises(Stopped, match=message) as stop:
        run_stoppable(block)
    assert stop.value.exit_code == 4


def test_a_second_sigterm_does_not_disturb_the_first() -> None:
    put_away = []

    def block() -> None:
        try:
            signal_to_me()
        finally:
            signal_to_me()
            put_away.append(True)

    with pytest.raises(Stopped):
        run_stoppable(block)
    assert put_away


def test_a_signal_at_the_very_end_is_a_stop_too_and_handlers_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    really, sent = signal.signal, []

    def restoring(number: int, handler: Any) -> Any:
        old = really(number, handler)
        if number == signal.SIGTERM and handler is before[0] and not sent:
            sent.append(number)
            signal_to_me(signal.SIGINT)
        return old

    monkeypatch.setattr(signal, "signal", restoring)
    with pytest.raises(Stopped):
        run_stoppable(lambda: None)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


TWICE = """
import os, signal
from llmt_prep.stopping import stoppable
with stoppable():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        print("too late")
"""


def test_a_second_sigint_ends_with_130_at_once() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TWICE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (130, "")


def test_a_dry_run_that_is_stopped_says_that_nothing_was_written(
    mix: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(pipeline, "select", lambda *_: signal_to_me(signal.SIGINT))
    with pytest.raises(Stopped, match="nothing was written: run the same command again"), stoppable(START_AGAIN):
        dry_run(MixConfig.model_validate(mix), workers=1)
    assert list(tmp_path.iterdir()) == []
