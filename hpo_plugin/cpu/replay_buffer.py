"""verl's replay buffer for runs with steps shorter than its polling interval.

``trainer.v1.sampler.custom_sampler`` selects it. verl passes neither the polling interval nor the group-filter settings
to a custom sampler (``PPOTrainer._build_replay_buffer``), so the config passes them in
``trainer.v1.sampler.sampler_kwargs`` (see ``configs/hpo/backend/cpu.yaml``).
"""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

SAMPLER_KEYS = frozenset(
    {
        "poll_interval",
        "filter_groups_enable",
        "filter_groups_metric",
        "max_inflight_gen_batches",
        "train_batch_size",
        "gen_batch_size",
        "sync_refill_failed_groups",
    }
)


class _InOrder(ReplayBuffer):
    """Selects prompts in a repeatable order; for ``trainer.v1.trainer_mode=sync``."""

    def _select_prompt_uids(
        self, partition_id: str, sampleable_keys: set[str], batch_size: int
    ) -> tuple[list[str], dict[str, dict], dict[str, int]]:
        """Select the oldest prompts in the data loader's order, which is the order of TransferQueue's keys."""
        prompt_steps = dict(self.prompt_global_steps[partition_id])
        position = {uid: index for index, uid in enumerate(prompt_steps)}
        ordered = sorted(sampleable_keys, key=lambda uid: (prompt_steps[uid], position[uid]))
        selected = ordered[:batch_size]
        rank = {uid: index for index, uid in enumerate(selected)}

        def session_order(key: str) -> tuple[int, int, int]:
            uid, session, index = key.split("_")
            return rank.get(uid, len(rank)), int(session), int(index)

        partition = self.partitions[partition_id]
        return selected, {key: partition[key] for key in sorted(partition, key=session_order)}, prompt_steps


class _InOrderAsync(_InOrder, ReplayBufferAsync):
    """The same buffer for the asynchronous trainer modes."""


def replay_buffer(
    trainer_mode: str,
    trainer_config: DictConfig,
    max_off_policy_threshold: int | None,
    max_off_policy_strategy: str,
    sampler_kwargs: DictConfig,
    refill_fn: Callable[[int], int] | None = None,
) -> ReplayBuffer:
    """Build verl's buffer for a trainer mode, with frequent polling and a repeatable order.

    verl polls for finished rollouts every 2 s, which is about as long as a step of a small model. verl also orders the
    prompts of a step by random ids, so two runs with the same seeds have different mini-batches. With this buffer, the
    prompts of a step keep the order of the data loader, and the responses of a prompt the order of their sessions.

    Args:
        trainer_mode: ``trainer.v1.trainer_mode``.
        trainer_config: The config section of that mode.
        max_off_policy_threshold: Passed to verl's buffer.
        max_off_policy_strategy: Passed to verl's buffer.
        sampler_kwargs: ``trainer.v1.sampler.sampler_kwargs`` with exactly the keys :data:`SAMPLER_KEYS`.
        refill_fn: The trainer's function that submits new prompts.

    Returns:
        verl's ``ReplayBuffer``, or its ``ReplayBufferAsync`` unless the mode is ``sync``.

    Raises:
        ValueError: Missing or unknown keys in ``sampler_kwargs``.
    """
    # Interpolations are resolved by iterating, for a DictConfig as for a dict.
    options: dict[str, Any] = {str(key): value for key, value in sampler_kwargs.items()}
    if options.keys() != SAMPLER_KEYS:
        raise ValueError(
            "trainer.v1.sampler.sampler_kwargs must have exactly the keys "
            f"{sorted(SAMPLER_KEYS)}. Add the missing keys {sorted(SAMPLER_KEYS - options.keys())}, and remove the "
            f"unknown keys {sorted(options.keys() - SAMPLER_KEYS)}."
        )
    metric = options["filter_groups_metric"] if options["filter_groups_enable"] else None
    refill_failed = bool(options["sync_refill_failed_groups"])
    train_batch_size = options["train_batch_size"]
    return (_InOrder if trainer_mode == "sync" else _InOrderAsync)(
        trainer_mode=trainer_mode,
        trainer_config=trainer_config,
        max_off_policy_threshold=max_off_policy_threshold,
        max_off_policy_strategy=max_off_policy_strategy,
        sampler_kwargs=sampler_kwargs,
        poll_interval=float(options["poll_interval"]),
        refill_fn=refill_fn,
        filter_groups_metric=metric,
        train_batch_size=train_batch_size,
        # The same as in PPOTrainer._build_replay_buffer: exact refills need single-prompt fetches.
        gen_batch_size=1 if metric is not None or refill_failed else options["gen_batch_size"] or train_batch_size,
        max_inflight_gen_batches=options["max_inflight_gen_batches"] if metric is not None else 1,
        sync_refill_failed_groups=refill_failed,
    )


#: The name in configs that version 0.1.0 saved.
CPUReplayBuffer = replay_buffer
