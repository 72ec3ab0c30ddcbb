"""What is known of a device by its name, or measured."""

import pytest
import torch

from llmt_shared.errors import ConfigError
from llmt_train.check import devices
from llmt_train.check.devices import find_gpu, measured_flops, named_device, this_device


def always(machine) -> bool:
    return True


def never(machine) -> bool:
    return False


@pytest.mark.parametrize(
    ("name", "memory", "capability"),
    [
        ("H100", 80, (9, 0)),
        ("NVIDIA H100 80GB HBM3", 80, (9, 0)),
        ("h200", 141, (9, 0)),
        ("A100", 80, (8, 0)),
        ("NVIDIA A100-SXM4-40GB", 40, (8, 0)),
        ("A100 40 GB", 40, (8, 0)),
        ("NVIDIA GH200 480GB", 96, (9, 0)),  # the 480 are of its CPU
        ("L40S", 48, (8, 9)),
        ("L4", 24, (8, 9)),
    ],
)
def test_a_name_says_memory_and_capability(name, memory, capability):
    device = named_device(name, always)
    assert (device.memory, device.machine.capability) == (memory * 10**9, capability)
    assert device.machine.device_type == "cuda"


def test_room_is_left_for_what_is_no_tensor():
    assert named_device("H100", always).room == 78.5e9
    here = this_device(never)
    assert here._replace(memory=16_500_000_000).room == 10e9
    assert here._replace(memory=None).room is None


def test_every_gpu_is_found_by_its_own_name():
    assert [find_gpu(gpu.name) for gpu in devices._GPUS] == list(devices._GPUS)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"--on: 'H1O0' is no GPU that is known, did you mean 'H100'\?; known: "):
        named_device("H1O0", always)


def test_the_data_sheet_speaks_of_bf16_alone():
    assert named_device("H100", always).flops == 989e12
    assert named_device("H100", never).flops is None


def test_a_matrix_product_is_timed():
    rate = measured_flops("cpu", torch.float32, seconds=0.01)
    assert 1e8 < rate < 1e15


def test_this_machine_without_a_gpu_is_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "measured_flops", lambda kind, dtype: {torch.float32: 1.0, torch.bfloat16: 2.0}[dtype])
    device = this_device(never)
    assert (device.machine.device_type, device.flops, device.is_here) == ("cpu", 1.0, True)
    assert this_device(always).flops == 2.0
    assert device.memory is not None
    assert device.memory > 10**8
