"""A run is asked to stop, and told to leave."""

import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist
from train.parallel.ranks import on_ranks

from llmt_train.stopping import StopRequest


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
    assert process.stderr is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert any(b"finishing this step" in line for line in process.stderr)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def _stops_after(heard_by: dict[int, int]) -> tuple[int, str | None]:
    """The step after which this rank stops, if ranks get SIGTERM in the steps given."""
    with StopRequest() as stop:
        for step in range(1, 10):
            if heard_by.get(dist.get_rank()) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.agreed():
                return step, stop.signal_name
    return 0, None


@pytest.mark.parametrize(
    ("heard_by", "wanted"), [({1: 3}, (3, "SIGTERM")), ({0: 5, 1: 2}, (2, "SIGTERM")), ({}, (0, None))]
)
def test_ranks_agree_on_the_step(heard_by: dict[int, int], wanted: tuple[int, str | None]):
    """A scheduler's signal reaches some of them, or not all in the same step."""
    assert on_ranks(2, _stops_after, heard_by) == [wanted, wanted]


def test_a_process_alone_agrees_with_itself():
    with StopRequest() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()


def _interrupted_after_agreement() -> str | None:
    with StopRequest() as stop:
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)  # its own first one, which Ctrl-C sends to every process
        return stop.signal_name


def test_ctrl_c_that_reaches_a_rank_late_is_not_a_second_one():
    assert on_ranks(2, _interrupted_after_agreement) == ["SIGINT", "SIGINT"]
