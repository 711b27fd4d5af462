"""The process group of a training rank on CPU."""

import os
from types import ModuleType

import torch.distributed as dist

_TORCHRUN_FUNCTION = "initialize_global_process_group"


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


def use_gloo_in_torchrun(distributed: ModuleType) -> None:
    """Make verl's SFT trainer, which torchrun starts, create its process group over gloo.

    ``initialize_global_process_group`` in ``verl/utils/distributed.py`` asks for ``cpu:gloo,cpu:gloo`` and, unlike the
    function for Ray's workers, does not leave an existing group alone; nor is ``external_lib`` imported by then.

    Args:
        distributed: The module ``verl.utils.distributed``.

    Raises:
        RuntimeError: verl has moved the function.
    """

    def initialize_global_process_group(timeout_second: int = 36000) -> tuple[int, int, int]:
        initialize_gloo()
        return int(os.environ["LOCAL_RANK"]), dist.get_rank(), dist.get_world_size()

    if not callable(getattr(distributed, _TORCHRUN_FUNCTION, None)):
        raise RuntimeError(
            f"{distributed.__name__}.{_TORCHRUN_FUNCTION} is not where verl 0.9.1 has it, so its SFT trainer cannot "
            "run on CPU; install verl==0.9.1"
        )
    setattr(distributed, _TORCHRUN_FUNCTION, initialize_global_process_group)
