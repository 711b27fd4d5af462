"""Copies the weights that verl's trainers with a separate rollout save and restore.

``DetachActorWorker.save_model_to_cpu`` (``verl/experimental/separation/engine_workers.py``) copies the actor's weights
from an accelerator to CPU memory, so that π_old can be restored for a later mini-batch. ``Tensor.cpu()`` does not copy
a tensor that is on the CPU, so the next update would change the saved weights.
"""

from types import ModuleType

from torch import Tensor, nn

_SAVE = "fsdp2_sharded_save_to_cpu"


def copy_saved_weights(fsdp_utils: ModuleType) -> None:
    """Make ``fsdp2_sharded_save_to_cpu`` return copies.

    If verl does not have the function, a call raises a RuntimeError; trainers that do not call it are not affected.

    Args:
        fsdp_utils: The module ``verl.utils.fsdp_utils``.
    """
    save = getattr(fsdp_utils, _SAVE, None)

    def fsdp2_sharded_save_to_cpu(model: nn.Module) -> tuple[dict[str, tuple[Tensor, object]], object]:
        if save is None:
            raise RuntimeError(
                f"{fsdp_utils.__name__}.{_SAVE} does not exist in this version of verl, so trainers with a separate "
                "rollout cannot run on CPU; install verl==0.9.1"
            )
        state, spec = save(model)
        return {name: (tensor.clone(), tensor_spec) for name, (tensor, tensor_spec) in state.items()}, spec

    setattr(fsdp_utils, _SAVE, fsdp2_sharded_save_to_cpu)
