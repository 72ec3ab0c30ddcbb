"""What is written down of a step beside its losses."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from train.tiny_models import packed, tiny

from llmt_train.data.stream import Plan
from llmt_train.model.flops import ModelFlops, model_flops
from llmt_train.watch import step_record
from llmt_train.watch.step_record import Meter, flops_of, peak_of_this_device

PLAN = Plan(num_rows=10, length=8, rows_per_step=3, micro_rows=2, accumulation=2, total_rows=7, total_steps=3, seed=0)
FLOPS = ModelFlops(per_token=10.0, per_key=100.0)


class Clock:
    """A clock, and a stream of batches that is waited for, both moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.waited = 100.0
        monkeypatch.setattr(step_record, "time", SimpleNamespace(monotonic=lambda: self.now))

    def meter(self, flops: ModelFlops | None = FLOPS, peak: float | None = None) -> Meter:
        return Meter(PLAN, flops, peak, lambda: self.waited)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def step(meter: Meter, clock: Clock, number: int, seconds: float = 2.0) -> dict:
    """A step of three rows in two micro-batches: 6 + 5 tokens, and 8, of 8 each."""
    meter.add(packed([[4, 2], [5]], 8))
    meter.add(packed([[8]], 8))
    clock.now += seconds
    return meter.read(number)


def test_amounts_are_of_the_run_and_fill_and_speed_of_the_step(clock):
    meter = clock.meter()
    step(meter, clock, 1, seconds=9)
    record = step(meter, clock, 2)
    assert (record["rows"], record["tokens"]) == (6, 48)
    assert record["tokens_per_s"] == 24 / 2
    assert record["fill"] == 19 / 24


def test_a_short_last_step_is_measured_by_its_own_rows(clock):
    meter = clock.meter()
    meter.add(packed([[4]], 8))
    meter.add(packed([[]], 8))  # its second micro-batch has no rows
    clock.now += 2
    record = meter.read(3)
    assert (record["rows"], record["fill"], record["tokens_per_s"]) == (7, 4 / 8, 8 / 2)


def test_the_arithmetic_is_that_of_the_segments(clock):
    """4, 2, 5 and 8 tokens: 10 + 3 + 15 + 36 pairs of query and key."""
    needed = 19 * 10.0 + 64 * 100.0
    assert step(clock.meter(), clock, 1)["tflops"] == round(needed / 2 / 1e12, 6)
    assert step(clock.meter(peak=1e4), clock, 1)["mfu"] == round(needed / 2 / 1e4, 4)


def test_there_is_one_of_mfu_and_tflops_or_none(clock):
    keys = [{"mfu", "tflops"} & step(clock.meter(*each), clock, 1).keys() for each in ((FLOPS, 1.0), (FLOPS,), (None,))]
    assert keys == [{"mfu"}, {"tflops"}, set()]


def test_the_wait_for_data_is_a_share_of_the_step(clock):
    meter = clock.meter()
    clock.waited += 0.5
    assert step(meter, clock, 1)["data_wait"] == 0.25
    assert step(meter, clock, 2)["data_wait"] == 0.0


def test_what_lies_between_steps_is_in_none_of_them(clock):
    meter = clock.meter()
    step(meter, clock, 1)
    clock.now += 1000  # an evaluation
    clock.waited += 1000
    meter.start()
    record = step(meter, clock, 2)
    assert (record["tokens_per_s"], record["data_wait"]) == (12.0, 0.0)


def test_logging_is_part_of_the_step_after_it(clock):
    meter = clock.meter()
    step(meter, clock, 1)
    clock.now += 2  # a slow disk or server
    assert step(meter, clock, 2)["tokens_per_s"] == 24 / 4


def test_the_peak_of_memory_is_what_the_system_says(clock):
    """In bytes; `VmHWM` is Linux's own account of it, in kB."""
    held = np.ones(50_000_000 // 8)
    record = step(clock.meter(), clock, 1)
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    assert record["peak_memory"] == pytest.approx(peak, rel=0.01)
    assert record["peak_memory"] > held.nbytes


def test_on_a_gpu_memory_is_what_torch_allocated(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert step(clock.meter(), clock, 1)["peak_memory"] == 123


def test_a_model_whose_config_does_not_say_has_no_flops():
    model = tiny("llama")
    assert flops_of(model) == model_flops(model)
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
    assert flops_of(model) is None


@pytest.mark.parametrize(
    ("name", "in_bf16", "peak"), [("NVIDIA A100-SXM4-80GB", True, 312e12), ("NVIDIA A100-SXM4-80GB", False, None),
                                  ("Radeon", True, None), (None, True, None)]
)  # fmt: skip
def test_mfu_is_of_bf16_on_a_known_device(name, in_bf16, peak, monkeypatch):
    monkeypatch.setattr(step_record, "this_device_name", lambda: name)
    assert peak_of_this_device(in_bf16) == peak


def test_the_peak_of_memory_is_this_process_own():
    """A process started by a large one has not been large itself."""
    ballast = np.ones(600_000_000, np.uint8)
    program = "from llmt_train.watch.step_record import _peak_memory; import torch; print(_peak_memory(False))"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(result.stdout) > 50_000_000
    assert int(result.stdout) < step_record._peak_memory(False)
    assert ballast.size == 600_000_000
