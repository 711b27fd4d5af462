"""The actor's worker: verl's, which counts signs over the whole step before the first micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import TrainingWorker

from hpo_plugin.glue.config import HPOPolicyLossConfig
from hpo_plugin.glue.registration import require_registered
from hpo_plugin.glue.step import Rows, gather_step, use_step

__all__ = ["HysteresisTrainingWorker"]


class HysteresisTrainingWorker(TrainingWorker):
    """verl's ``TrainingWorker`` with one collective more per step (verl/workers/engine_workers.py).

    With any config whose ``policy_loss`` is not :class:`HPOPolicyLossConfig` it is exactly verl's.
    """

    @property
    def _policy_loss_config(self) -> HPOPolicyLossConfig | None:
        # verl sets loss_fn to functools.partial(ppo_loss, config=actor_config).
        actor_config = getattr(self.loss_fn, "keywords", {}).get("config")
        policy_loss = getattr(actor_config, "policy_loss", None)
        return policy_loss if isinstance(policy_loss, HPOPolicyLossConfig) else None

    def _all_gather(self, value: Any) -> list[Any]:
        group = self.engine.get_data_parallel_group()
        if group is None or torch.distributed.get_world_size(group) == 1:
            return [value]
        values = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(values, value, group)
        return values

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """Count the signs of all rows of the step over the data-parallel group, then train as verl does.

        Args:
            data: this rank's rows of the step, batch size n: nested ``advantages`` and ``response_mask``, ``uid``,
                and what verl's own method needs.

        Returns:
            verl's output, with this package's metrics added (``docs/metrics.md``); None where verl gives None.
        """
        config = self._policy_loss_config
        if config is None:
            return super().train_mini_batch(data)
        require_registered(config.adv_estimator, config.loss_mode)
        padded = data.select("advantages", "response_mask").to_padded_tensor()
        uid = data.get("uid", None)
        step = gather_step(
            Rows.of(padded["advantages"], padded["response_mask"], None if uid is None else uid.tolist()),
            adv_estimator=config.adv_estimator,
            hysteresis=config.hysteresis,
            weigh=config.weigh,
            alpha=config.alpha,
            alpha_min=config.alpha_min,
            all_gather=self._all_gather,
        )
        with use_step(step):
            output = super().train_mini_batch(data)
        metrics = step.metrics | step.loss_metrics(self._all_gather)
        if output is not None:
            tu.get(output, "metrics").update({f"actor/{key}": [value] for key, value in metrics.items()})
        return output
