"""How long ranks wait in a group: torch gives every group but that of all half an hour, whatever the user wants."""

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout


def as_patient_as_all(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Let the ranks of a group wait for each other as long as in the group of all (`parallel.timeout`); return it."""
    world = dist.group.WORLD
    assert world is not None
    # With GPUs too: then that group has gloo beside NCCL. Pretended groups have neither.
    backend = world._get_backend(torch.device("cpu")) if torch.device("cpu") in world._device_types else None
    if isinstance(backend, dist.ProcessGroupGloo):
        _set_pg_timeout(backend.options._timeout, group)
    return group
