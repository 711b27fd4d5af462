"""Weights that verl's separate trainers set aside and restore.

``DetachActorWorker.save_model_to_cpu`` (``verl/experimental/separation/engine_workers.py``) copies the actor's weights
from an accelerator to CPU memory, so that π_old can be restored for a later mini-batch. ``Tensor.cpu()`` copies nothing
that is on the CPU already: what was saved would change with the next update.
"""

from types import ModuleType

from torch import Tensor, nn

_SAVE = "fsdp2_sharded_save_to_cpu"


def copy_saved_weights(fsdp_utils: ModuleType) -> None:
    """Make ``fsdp2_sharded_save_to_cpu`` return copies.

    Where verl has moved the function, calling it raises a RuntimeError; trainers that do not call it run as before.

    Args:
        fsdp_utils: The module ``verl.utils.fsdp_utils``.
    """
    save = getattr(fsdp_utils, _SAVE, None)

    def fsdp2_sharded_save_to_cpu(model: nn.Module) -> tuple[dict[str, tuple[Tensor, object]], object]:
        if save is None:
            raise RuntimeError(
                f"{fsdp_utils.__name__}.{_SAVE} is not where verl 0.9.1 has it, so trainers with a separate rollout "
                "cannot run on CPU; install verl==0.9.1"
            )
        state, spec = save(model)
        return {name: (tensor.clone(), tensor_spec) for name, (tensor, tensor_spec) in state.items()}, spec

    setattr(fsdp_utils, _SAVE, fsdp2_sharded_save_to_cpu)
