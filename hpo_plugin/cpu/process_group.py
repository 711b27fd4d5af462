"""The process group of a training rank on CPU."""

import os
from types import ModuleType

import torch.distributed as dist

_TORCHRUN_FUNCTION = "initialize_global_process_group"


def initialize_gloo() -> None:
    """Create torch's default process group over gloo, from the environment of verl's workers.

    verl would create a group for ``cpu:gloo,<device>:<backend>``, which names the device ``cpu`` twice; torch rejects
    it. verl does not replace an existing group (``verl/utils/distributed.py``,
    ``initialize_global_process_group_ray``). The call is collective: each rank of the worker group waits for the
    others. It does nothing if a group exists.
    """
    if dist.is_initialized():
        return
    dist.init_process_group(
        backend="gloo",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        init_method=os.environ.get("DIST_INIT_METHOD"),
    )


def use_gloo_in_torchrun(distributed: ModuleType) -> None:
    """Make verl's SFT trainer, which torchrun starts, create its process group over gloo.

    ``initialize_global_process_group`` in ``verl/utils/distributed.py`` creates a group for ``cpu:gloo,cpu:gloo``.
    Unlike the function for Ray's workers, it does not check for an existing group, and verl calls it before it imports
    ``external_lib``.

    Args:
        distributed: The module ``verl.utils.distributed``.

    Raises:
        RuntimeError: This version of verl does not have the function.
    """

    def initialize_global_process_group(timeout_second: int = 36000) -> tuple[int, int, int]:
        initialize_gloo()
        return int(os.environ["LOCAL_RANK"]), dist.get_rank(), dist.get_world_size()

    if not callable(getattr(distributed, _TORCHRUN_FUNCTION, None)):
        raise RuntimeError(
            f"{distributed.__name__}.{_TORCHRUN_FUNCTION} does not exist in this version of verl, so its SFT trainer "
            "cannot run on CPU; install verl==0.9.1"
        )
    setattr(distributed, _TORCHRUN_FUNCTION, initialize_global_process_group)
