"""Which Ray cluster is meant: what is said, then the environment's, then this machine's, then one of its own."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmt_prep.executor.address import address_of
from llmt_shared.errors import ConfigError


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster of this machine is found."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def head() -> Iterator[str]:
    """Address of somebody who listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def nobody() -> str:
    """An address at which nothing listens any more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def runs_here(folder: Path, address: str) -> None:
    """Leave what `ray start` leaves."""
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(address)


def test_without_any_cluster_one_is_started() -> None:
    assert address_of(None) == "local"


def test_what_is_said_comes_before_the_environment_and_that_before_this_machine(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_here(tmp_path, head)
    assert address_of(None) == address_of("auto") == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert address_of(None) == address_of("auto") == "local"
    assert address_of(head) == head


def test_a_cluster_that_has_ended_is_not_waited_for(nobody: str, tmp_path: Path) -> None:
    runs_here(tmp_path, nobody)
    assert address_of(None) == "local"
    with pytest.raises(ConfigError, match="auto, but no Ray cluster runs on this machine"):
        address_of("auto")


def test_a_head_that_does_not_answer_is_told_at_once(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"nothing answers at {nobody}"):
        address_of(nobody)
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    with pytest.raises(ConfigError, match=f"nothing answers at {nobody}"):
        address_of(None)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "leads through a proxy; wanted the cluster's own, as HOST:6379"),
        ("https://head", "leads through a proxy"),
        ("head", "wanted HOST:PORT"),
        ("head:ray", "wanted HOST:PORT"),
        (":6379", "wanted HOST:PORT"),
    ],
)
def test_an_address_that_cannot_serve_is_refused(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        address_of(address)
