"""Makes verl's SFT trainer train all epochs after a resume at the end of an epoch.

The SFT configs of this package import this module with ``model.external_lib``. In other runs, it has no effect.

A checkpoint that verl saves after the last step of an epoch contains the state of a data loader without further
batches. verl restores this state, so the next epoch has no steps, and the run ends early and without an error (verl's
issue 7401). At the end of an epoch there is no position to restore: the next epoch starts with a new iterator, in the
order that ``DistributedSampler.set_epoch`` sets.
"""

import functools

from verl.utils.checkpoint.checkpoint_handler import CheckpointHandler

_LOAD = "_load_dataloader_state"


def restore_within_epochs() -> None:
    """Make ``CheckpointHandler`` restore the position in the data only if the checkpoint is within an epoch.

    Raises:
        RuntimeError: This version of verl has no such method.
    """
    load = getattr(CheckpointHandler, _LOAD, None)
    if load is None:
        raise RuntimeError(
            f"verl's CheckpointHandler has no method {_LOAD} in this version, so an SFT run that is resumed at the end "
            "of an epoch may skip the next one; install verl==0.9.1, or remove hpo_plugin.verl.sft_resume from "
            "model.external_lib"
        )

    @functools.wraps(load)
    def within_epochs(self: CheckpointHandler, checkpoint_path: str) -> None:
        if self.resume_global_step % len(self.train_dataloader) != 0:
            load(self, checkpoint_path)

    setattr(CheckpointHandler, _LOAD, within_epochs)


restore_within_epochs()
