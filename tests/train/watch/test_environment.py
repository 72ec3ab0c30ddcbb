"""What a checkpoint says of the machine that made it."""

import json

import torch

from llmt_train.watch import environment as module
from llmt_train.watch.environment import environment, versions


class Properties:
    def __init__(self, name: str) -> None:
        self.name, self.total_memory = name, 80_000


def test_a_machine_without_a_gpu_says_so():
    found = environment()
    assert found["devices"] == []
    assert found["threads"] == torch.get_num_threads()
    assert found["cpus"] >= 1
    assert found["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found


def test_every_gpu_and_its_driver_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties(f"GPU {index}"))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_000)
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54\nGCC version: 12\n")
    monkeypatch.setattr(module, "_DRIVER", tmp_path / "version")
    found = environment()
    assert found["device"] == "GPU 0"
    assert found["devices"] == [{"name": "GPU 0", "memory": 80_000}, {"name": "GPU 1", "memory": 80_000}]
    assert (found["cudnn"], found["driver"]) == (91_000, "NVIDIA UNIX x86_64 Kernel Module  550.54")


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(module, "_PACKAGES", ("torch", "no-such-package"))
    assert versions() == {"torch": torch.__version__, "no-such-package": None}
