"""How a run is laid out over devices."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from llmt_shared.config import PositiveInt, StrictModel


class ParallelConfig(StrictModel):
    """One process drives one device; dp x cp x tp of them run."""

    dp: PositiveInt | Literal["auto"] = "auto"
    """Groups of devices that read different rows; their parameters are sharded (FSDP2). auto: as many as there are
    devices for."""
    tp: PositiveInt = 1
    """Devices that share every layer (tensor parallel); they should be of one machine."""
    sp: bool = True
    """With tp: split what lies between the layers by tokens too (sequence parallel), which takes less memory."""
    cp: PositiveInt = 1
    """Devices that share every row (context parallel, by heads): for rows longer than one device holds."""
    replicate: PositiveInt = 1
    """Of the dp groups, how many hold the parameters once each (HSDP): the number of nodes, where the network between
    them is slow. 1 shards over all."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in the host's memory: slower, for models that do not fit."""
    no_sync: bool = False
    """Exchange gradients once a step instead of once a micro-batch; takes memory for whole gradients."""
    timeout: PositiveInt = 600
    """Seconds after which a process that waits for the others gives up."""

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[str]:
        """Copies of the parameters are made by groups."""
        dp, replicate = given.get("dp", "auto"), given.get("replicate", 1)
        if isinstance(dp, int) and isinstance(replicate, int) and replicate > 0 and dp % replicate:
            legal = [number for number in range(1, dp + 1) if dp % number == 0]
            yield f"replicate {replicate} does not divide dp {dp}; legal: {', '.join(map(str, legal))}"
