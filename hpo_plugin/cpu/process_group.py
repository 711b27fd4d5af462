"""The process group of a training rank on CPU."""

import os

import torch.distributed as dist


def initialize_gloo() -> None:
    """Create torch's default process group over gloo, from the environment verl gives its workers.

    verl would ask for ``cpu:gloo,<device>:<backend>``, which names the device ``cpu`` twice here and is refused by
    torch; it leaves an existing group alone (``verl/utils/distributed.py``,
    ``initialize_global_process_group_ray``). Collective over the ranks of the worker group: each one waits for the
    others. Does nothing when a group exists already.
    """
    if dist.is_initialized():
        return
    dist.init_process_group(
        backend="gloo",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        init_method=os.environ.get("DIST_INIT_METHOD"),
    )
