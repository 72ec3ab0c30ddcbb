"""Which Ray cluster is meant, and whether anybody answers there: Ray itself would try for minutes."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from llmt_shared.errors import ConfigError


def address_of(said: str | None) -> str:
    """Where to join: what is said, else $RAY_ADDRESS, else a running cluster of this machine, else `local`.

    Raises:
        ConfigError: nothing answers there, or it is an address that cannot serve.
    """
    address = said or os.environ.get("RAY_ADDRESS") or running() or "local"
    if address == "local":
        return address
    if address == "auto":
        if (found := running()) is None:
            raise ConfigError("ray.address: auto, but no Ray cluster runs on this machine; start one with `ray start`")
        return found
    if "://" in address:
        raise ConfigError(
            f"ray.address: {address!r} leads through a proxy; wanted the cluster's own, as HOST:6379, from a machine "
            f"that is one of its nodes, for this process must see the files that the workers write"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"ray.address: {address!r}; wanted HOST:PORT, as `ray start --head` tells it, auto or local")
    if not answers(address):
        raise ConfigError(f"ray.address: nothing answers at {address}; is the cluster running?")
    return address


def running() -> str | None:
    """Address of the cluster that `ray start` has started on this machine, where it still runs."""
    folder = os.environ.get("RAY_TMPDIR") or "/tmp"  # noqa: S108  where Ray has it
    with suppress(OSError):
        address = Path(folder, "ray", "ray_current_cluster").read_text().strip()
        return address if answers(address) else None
    return None


def answers(address: str) -> bool:
    """Whether somebody listens."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True
