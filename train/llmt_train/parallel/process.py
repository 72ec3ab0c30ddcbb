"""The process group of this process."""

import os

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment

from llmt_train.config import ParallelConfig
from llmt_train.parallel.layout import layout_of
from llmt_train.parallel.mesh import Mesh, build_mesh


def join(config: ParallelConfig) -> Mesh:
    """Take this process's place among the others."""
    if not dist.is_initialized():
        store = dist.HashStore()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    layout = layout_of(config, dist.get_world_size())
    return build_mesh(layout, "cuda" if torch.cuda.is_available() else "cpu")


class ProcessGroup(ClusterEnvironment):
    """The process group that is there, as Lightning asks for it."""

    creates_processes_externally = True

    @property
    def local_world(self) -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", str(dist.get_world_size())))

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        return dist.is_initialized()

    def world_size(self) -> int:
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def node_rank(self) -> int:
        return 0
