"""A self-test that determines whether this package works with the installed version of verl.

The version number is not sufficient: verl's main branch has the number of a release that does not exist yet, and the
interfaces that this package uses have not changed since 0.8. For a version that the package was not tested with, the
self-test passes one small batch through verl's own ``compute_advantage`` and ``ppo_loss``, with the estimator and the
policy loss of this package, and compares the gradient with :func:`hpo_plugin.algorithm.hpo_loss`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from hpo_plugin import algorithm
from hpo_plugin.verl import metrics
from hpo_plugin.verl.registration import RegistrationError

__all__ = ["TESTED_VERL", "require_supported_verl", "self_test"]

#: Versions of verl that the tests of this package use (``docs/versions.md``).
TESTED_VERL = ("0.9.0", "0.9.1")

# One of four responses solves prompt a, all responses solve prompt b; the last row is padding.
REWARDS = (1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0)
UIDS = ("a", "a", "a", "a", "b", "b", "padding")
LENGTHS = (3, 1, 2, 3, 2, 1, 0)
EXPECTED_ALPHA = 1 / 3
TOLERANCE = 1e-5


def require_supported_verl() -> list[str]:
    """Raise if this package does not work with the installed version of verl.

    Returns:
        A line that names the version, if it is not one of :data:`TESTED_VERL` and passed the self-test.

    Raises:
        RegistrationError: if the version failed the self-test; the message states the difference.
    """
    from verl import __version__

    if __version__ in TESTED_VERL:
        return []
    if problem := self_test():
        raise RegistrationError(
            f"hpo_plugin does not work with verl {__version__}: {problem}. Install verl {' or '.join(TESTED_VERL)}."
        )
    return [
        f"warning: hpo_plugin was not tested with verl {__version__}, only with {', '.join(TESTED_VERL)}; "
        "the self-test passed"
    ]


@functools.cache
def self_test() -> str | None:
    """Run the self-test with the installed verl, once per process.

    Returns:
        The problem in one line; None if the self-test passed.
    """
    try:
        return _advantages_and_gradient()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        # Remove the self-test's batch from the metrics of the run.
        metrics.drain()


def _compute_advantage() -> Callable[..., Any]:
    for name in ("verl.trainer.ppo.v1.utils", "verl.trainer.ppo.ray_trainer"):
        try:
            function: Callable[..., Any] = importlib.import_module(name).compute_advantage
        except (ModuleNotFoundError, AttributeError):
            continue
        return function
    raise ImportError("neither verl.trainer.ppo.v1.utils nor verl.trainer.ppo.ray_trainer has compute_advantage")


def _advantages_and_gradient() -> str | None:
    from verl import DataProto

    mask = torch.arange(3) < torch.tensor(LENGTHS).unsqueeze(1)
    rewards = torch.zeros(mask.shape)
    rewards[:, 0] = torch.tensor(REWARDS)
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": mask.long()},
        non_tensors={"uid": np.array(UIDS, dtype=object)},
    )
    config = OmegaConf.create(
        {"adv_estimator": "ahpo", "use_kl_in_reward": False, "hpo": {"alpha_min": 0.0, "alpha": 0.6}}
        | {"norm_adv_by_std_in_grpo": True}
    )
    data = _compute_advantage()(data, adv_estimator="ahpo", config=config)
    # Mean 1/4 and std 1/2.
    expected = torch.tensor([1.5, *[-0.5 * EXPECTED_ALPHA] * 3, 0.0, 0.0, 0.0])
    advantages = data.batch["advantages"]
    if not torch.allclose(advantages, expected.unsqueeze(-1) * mask, atol=TOLERANCE):
        found, wanted = ([round(float(a), 4) for a in values] for values in (advantages[:, 0], expected))
        return f"compute_advantage returns the advantages {found} instead of {wanted}"

    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(mask.shape, generator=generator)
    new = old + 0.3 * torch.randn(mask.shape, generator=generator)
    gradient = _gradient_of_verl(new, old, advantages, mask)
    log_prob = new.clone().requires_grad_()
    unweighted = torch.where(advantages < 0, advantages / EXPECTED_ALPHA, advantages)
    algorithm.hpo_loss(log_prob, old, unweighted, mask, alpha=EXPECTED_ALPHA).backward()
    assert log_prob.grad is not None
    error = float((gradient - log_prob.grad).abs().max() / log_prob.grad.abs().max())
    return None if error <= TOLERANCE else f"the gradient of ppo_loss differs from the reference by {error:.1e}"


def _gradient_of_verl(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The gradient of verl's ``ppo_loss`` with this package's policy loss, over two micro-batches."""
    from verl import DataProto
    from verl.utils import tensordict_utils
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    from hpo_plugin.verl.config import HPOPolicyLossConfig

    actor = ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=HPOPolicyLossConfig(loss_mode="ahpo", adv_estimator="ahpo"),
    )
    log_prob = new.clone().requires_grad_()
    for rows in (slice(0, 2), slice(2, None)):
        size = len(mask[rows])
        tensors = {
            "prompts": torch.zeros(size, 1, dtype=torch.long),
            "responses": torch.zeros(size, mask.shape[1], dtype=torch.long),
            "attention_mask": torch.ones(size, mask.shape[1] + 1, dtype=torch.long),
            "response_mask": mask[rows].long(),
            "old_log_probs": old[rows],
            "advantages": advantages[rows],
        }
        batch = DataProto.from_dict(tensors=tensors).batch
        tensordict_utils.assign_non_tensor(
            batch, dp_size=1, batch_num_tokens=sum(LENGTHS), global_batch_size=len(LENGTHS)
        )
        # The model's output has one more position, for the prompt, and is shifted by one token.
        output = torch.nn.functional.pad(log_prob[rows], (0, 1)).flatten()
        ppo_loss(actor, {"log_probs": output}, batch)[0].backward()
    assert log_prob.grad is not None
    return log_prob.grad
