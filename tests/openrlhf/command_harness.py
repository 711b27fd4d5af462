"""Runs ``python -m hpo_plugin.openrlhf`` to where OpenRLHF has started Ray, then OpenRLHF's trainers on a batch.

    python command_harness.py OUT <arguments of the command>

Instead of models and vLLM engines, which need GPUs, ``PPOTrainer`` and the asynchronous ``TrainingActor`` get a
stand-in for the group of actors. It answers with log-probabilities of 0; OUT gets the experiences that it was sent, and
what else the tests look at. The variant ``tenth`` is that of ``tenth_hpo.py``.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import openrlhf.utils
import openrlhf_harness
import ray
import tenth_hpo  # noqa: F401
import torch

from hpo_plugin.openrlhf import command

OUT = sys.argv.pop(1)
get_strategy = openrlhf.utils.get_strategy


class Group:
    """What the trainers call of OpenRLHF's ``RayActorGroup``."""

    def __init__(self, file: str) -> None:
        self.file = file

    def async_run_method_batch(self, method_name: str, **columns: Any) -> list[Any]:
        if method_name == "forward":
            return [ray.put([torch.zeros(mask.shape) for mask in columns["action_mask"]])]
        experiences = columns["experience"]
        found = {
            # Two values in a row: 0, and that of all tokens of the response.
            "advantages": torch.cat([e.advantages.amin(dim=1) + e.advantages.amax(dim=1) for e in experiences]),
            "rewards": torch.cat([e.rewards for e in experiences]),
            "info": experiences[0].info,
            "environment": {
                name: os.environ.get(name) for name in ("MINE", "NCCL_DEBUG", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS")
            },
            "process": os.getpid(),
        }
        torch.save(found, self.file)
        return [ray.put(None)]

    def async_run_method(self, method_name: str, **_: Any) -> list[Any]:
        return [ray.put({"policy_loss": 0.0} if method_name == "fit" else None)]


def instead_of_training(args: SimpleNamespace) -> Any:
    """OpenRLHF's command calls ``get_strategy`` when Ray runs."""
    from openrlhf.trainer.ppo_trainer import PPOTrainer
    from openrlhf.trainer.ppo_trainer_async import TrainingActor

    torch.manual_seed(1)
    samples = openrlhf_harness.rollout(args.rollout.batch_size * args.rollout.n_samples_per_prompt, graded=False)
    strategy, model = get_strategy(args), args.actor.model_name_or_path
    queues: dict[str, None] = dict.fromkeys(("vllm_lock", "rollout_queue", "rollout_slots"))
    found: dict[str, Any] = {"arguments": sys.argv[1:], "process": os.getpid()}
    for name, make in {
        "PPOTrainer": lambda group: PPOTrainer.remote(model, strategy, group, None, None, None, None),
        "TrainingActor": lambda group: TrainingActor.remote(model, strategy, group, None, None, None, None, **queues),
    }.items():
        file = f"{OUT}.{name}"
        trainer = make(Group(file))
        ray.get(trainer.train_step.remote(samples, 0))
        ray.kill(trainer)
        found[name] = torch.load(file)
    torch.save(found, OUT)
    ray.shutdown()
    raise SystemExit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    openrlhf.utils.get_strategy = instead_of_training
    command.main()
