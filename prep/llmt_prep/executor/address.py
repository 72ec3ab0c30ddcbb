"""Which Ray cluster is meant, and whether anybody answers there: Ray itself would try for minutes."""

import os
import socket
from pathlib import Path

from llmt_shared.errors import ConfigError

HERE = "auto"
"""The cluster that `ray start` has started on this machine."""


def address_of(said: str | None) -> str:
    """Where to join: what is said, else $RAY_ADDRESS, else `HERE` where it runs, else `local`: a new one.

    Raises:
        ConfigError: nothing answers there, or it is an address that cannot serve.
    """
    address = said if said not in (None, HERE) else os.environ.get("RAY_ADDRESS") or said
    if address is None:
        return HERE if _runs_here() else "local"
    if address == "local":
        return address
    if address == HERE:
        if not _runs_here():
            raise ConfigError("ray.address: auto, but no Ray cluster runs on this machine; start one with `ray start`")
        return address
    if "://" in address:
        raise ConfigError(
            f"ray.address: {address!r} leads through a proxy; wanted the cluster's own, as HOST:6379, from a machine "
            f"that is one of its nodes, for this process must see the files that the workers write"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"ray.address: {address!r}; wanted HOST:PORT, as `ray start --head` tells it, auto or local")
    if not _answers(address):
        raise ConfigError(f"ray.address: nothing answers at {address}; is the cluster running?")
    return address


def _runs_here() -> bool:
    folder = os.environ.get("RAY_TMPDIR") or "/tmp"  # noqa: S108  where Ray has it
    try:
        return _answers(Path(folder, "ray", "ray_current_cluster").read_text().strip())
    except OSError:
        return False


def _answers(address: str) -> bool:
    """Whether somebody listens."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True
