"""The product of all weights a response gets, in each of verl's trainers: α for a negative one, once.

Each case runs the trainer's own code from the rewards to the advantages, and the policy loss with the config that a
worker copies when it starts. On policy, the gradient of a token is −w A / tokens of the batch, so w can be read off.
Whole runs of the trainers are in ``tests/cpu/test_legacy_trainer.py``.
"""

from __future__ import annotations

import ast
import copy
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import verl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.rollout_corr_helper import apply_bypass_mode, compute_rollout_correction_and_add_to_batch
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass

from hpo_plugin.verl import metrics, seams

VERL = Path(verl.__file__).parent

REWARDS = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
UIDS = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
LENGTHS = torch.tensor([1, 3, 2, 4, 2, 2, 2, 2, 3, 1, 4, 2])
"""Group a: 1 of 4, b: 0 of 4, c: 2 of 4. 3 positive and 5 negative: α = 3/5."""

ALPHA = 3 / 5
SECOND = torch.tensor([0.0] * 11 + [1.0])
"""The last response is not what was rolled out: its tokens are rejected, or get another importance weight."""


def plain(rewards: list[float], uids: list[str], valid: list[bool]) -> torch.Tensor:
    """GRPO's advantages; rows that are not valid are in no group."""
    values = []
    for i, (reward, uid) in enumerate(zip(rewards, uids, strict=True)):
        group = torch.tensor([r for r, u, v in zip(rewards, uids, valid, strict=True) if u == uid and v])
        values.append(float((reward - group.mean()) / (group.std() + 1e-6)) if valid[i] else 0.0)
    return torch.tensor(values)


def config_of(trainer: str, *overrides: str) -> DictConfig:
    directory, name = VERL / "trainer" / "config", "ppo_trainer"
    if trainer in ("one-step-off", "fully-async"):
        folder = {"one-step-off": "one_step_off_policy", "fully-async": "fully_async_policy"}[trainer]
        name = {"one-step-off": "one_step_off_ppo_trainer", "fully-async": "fully_async_ppo_trainer"}[trainer]
        directory = VERL / "experimental" / folder / "config"
    settings = ["trainer.use_v1=False"] if trainer == "legacy" else []
    if trainer.startswith("V1"):
        settings = [f"trainer.v1.trainer_mode={trainer.split()[1]}"]
    with initialize_config_dir(str(directory), version_base=None):
        config = compose(
            name,
            [
                f"hydra.searchpath=[file://{VERL}/trainer/config]",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                "actor_rollout_ref.rollout.n=4",
                *settings,
                *overrides,
            ],
        )
    seams.prepare(config)
    return config


def batch() -> dict[str, torch.Tensor]:
    mask = (torch.arange(4) < LENGTHS.unsqueeze(1)).long()
    scores = torch.zeros(12, 4)
    scores[torch.arange(12), LENGTHS - 1] = torch.tensor(REWARDS)
    old = torch.full((12, 4), -1.0)
    return {
        "rm_scores": scores,
        "response_mask": mask,
        "old_log_probs": old,
        "rollout_log_probs": old - SECOND.unsqueeze(1),
        "values": torch.full((12, 4), 0.25) * mask,
    }


class Storage:
    """TransferQueue's functions on a dictionary: nested tensors in, nested tensors out."""

    def __init__(self, fields: dict[str, torch.Tensor]) -> None:
        self.fields: dict[str, Any] = {
            name: torch.nested.as_nested_tensor(
                [row[:length] for row, length in zip(value, LENGTHS, strict=True)], layout=torch.jagged
            )
            for name, value in fields.items()
        }

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        data = TensorDict({n: self.fields[n] for n in select_fields if n in self.fields}, batch_size=len(keys))
        tu.assign_non_tensor_stack(data, "uid", UIDS)
        return data

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: TensorDict) -> Any:
        self.fields |= {name: fields[name] for name in fields.keys()}  # noqa: SIM118
        return SimpleNamespace(keys=keys, partition_id=partition_id)


def in_v1(config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    storage = Storage(batch())
    monkeypatch.setattr(trainer_base, "tq", storage)
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(UIDS)]

    class KeysBatch(SimpleNamespace):
        def __len__(self) -> int:
            return len(keys)

    meta = KeysBatch(keys=keys, partition_id="train")
    trainer_base.PPOTrainer._compute_advantage(SimpleNamespace(config=config), meta, {})
    return {name: value.to_padded_tensor(0.0) for name, value in storage.fields.items()}


def in_legacy(config: DictConfig) -> dict[str, torch.Tensor]:
    """What ``RayPPOTrainer.fit`` does between log-probabilities and the update (verl/trainer/ppo/ray_trainer.py)."""
    data = DataProto.from_dict(tensors=batch(), non_tensors={"uid": np.array(UIDS, dtype=object)})
    correction = config.algorithm.rollout_correction
    if correction.bypass_mode:
        apply_bypass_mode(data, correction, config.actor_rollout_ref.actor.policy_loss)
    data.batch["token_level_scores"] = data.batch["token_level_rewards"] = data.batch["rm_scores"]
    if not correction.bypass_mode:
        data, _ = compute_rollout_correction_and_add_to_batch(data, correction)
    data = ray_trainer.compute_advantage(
        data, adv_estimator=config.algorithm.adv_estimator, config=config.algorithm, num_repeat=4
    )
    return dict(data.batch.items())


def in_separation(config: DictConfig, cls: type) -> dict[str, torch.Tensor]:
    fields = batch()
    data = DataProto.from_dict(tensors=fields, non_tensors={"uid": np.array(UIDS, dtype=object)})
    trainer = SimpleNamespace(
        config=config,
        metrics={},
        timing_raw=defaultdict(float),
        reward_tensor=fields["rm_scores"],
        reward_extra_infos_dict={},
    )
    if config.algorithm.rollout_correction.bypass_mode:
        data = cls._fit_compute_log_prob(trainer, data)
    return dict(cls._fit_compute_advantage(trainer, data).batch.items())


def estimated(trainer: str, config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The batch after the trainer's own code from rewards to advantages."""
    if trainer.startswith("V1"):
        return in_v1(config, monkeypatch)
    if trainer == "legacy":
        return in_legacy(config)
    return in_separation(config, OneStepOffRayTrainer if trainer == "one-step-off" else SeparateRayPPOTrainer)


def weights(trainer: str, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[list[float], dict[str, float]]:
    """The product of all weights of each response with an advantage, and what was logged."""
    metrics.drain()
    config = config_of(trainer, *overrides)
    # A worker copies the config when it starts, before any step.
    worker = omega_conf_to_dataclass(copy.deepcopy(config.actor_rollout_ref.actor))
    with open_dict(config):
        config.algorithm.rollout_correction.setdefault("bypass_mode", False)
    out = estimated(trainer, config, monkeypatch)
    mask = out["response_mask"].bool()
    old = torch.full((12, 4), -1.0)
    log_prob = old.clone().requires_grad_()
    # V1 and legacy count the tokens of a mini-batch in ``loss_mask``; here it is what was generated.
    tokens = int(LENGTHS.sum())
    worker.global_batch_info.update(dp_size=1, batch_num_tokens=tokens)
    loss_fn = core_algos.get_policy_loss_fn(worker.policy_loss.loss_mode)
    loss, _ = loss_fn(
        old_log_prob=old,
        log_prob=log_prob,
        advantages=out["advantages"],
        response_mask=mask,
        loss_agg_mode=worker.loss_agg_mode,
        config=worker,
        rollout_is_weights=out.get("rollout_is_weights"),
    )
    (gradient,) = torch.autograd.grad(loss, log_prob)
    advantage = plain(REWARDS, UIDS, mask.any(1).tolist())
    found = [-float(gradient[i, 0]) * tokens / float(a) if abs(a) > 1e-6 else None for i, a in enumerate(advantage)]
    assert found[4:8] == [None] * 4
    return [float(w) for w in found if w is not None], metrics.drain()


ALL = ("V1 sync", "V1 colocate_async", "V1 separate_async", "legacy", "one-step-off", "fully-async")

KEYS = {
    "preset": ["+algorithm.policy_loss=ahpo"],
    "both": ["algorithm.adv_estimator=ahpo", "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"],
    "loss": ["algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"],
    "estimator": ["algorithm.adv_estimator=ahpo"],
}

BYPASS = "algorithm.rollout_correction.bypass_mode"


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("trainer", ALL)
def test_each_negative_response_is_weighted_by_alpha_once(monkeypatch, trainer, keys, bypass):
    """With the first design, the legacy trainer's bypass mode gave α² = 9/25."""
    found, logged = weights(trainer, monkeypatch, *KEYS[keys], f"{BYPASS}={bypass}")
    expected = [1, *[ALPHA] * 3, 1, 1, ALPHA, ALPHA]
    assert found == pytest.approx(expected, rel=1e-5)
    assert logged["actor/hpo/alpha"] == pytest.approx(ALPHA)


@pytest.mark.parametrize("trainer", ALL)
def test_importance_weights_of_rollout_correction_are_multiplied_in_once(monkeypatch, trainer):
    """The last response: α times exp(1), truncated at 2."""
    correction = "algorithm.rollout_correction"
    settings = [f"{BYPASS}=False", f"{correction}.rollout_is=token", f"{correction}.rollout_is_threshold=2.0"]
    found, _ = weights(trainer, monkeypatch, *KEYS["preset"], *settings)
    assert found == pytest.approx([1, *[ALPHA] * 3, 1, 1, ALPHA, 2 * ALPHA], rel=1e-5)


@pytest.mark.parametrize("trainer", ALL)
def test_a_rejected_response_is_counted_nowhere(monkeypatch, trainer):
    """Without the last response group c has 2 positives and 1 negative: α = 3/4."""
    correction = "algorithm.rollout_correction"
    settings = [f"{BYPASS}=False", f"{correction}.rollout_rs=seq_mean_k1", f"{correction}.rollout_rs_threshold=0.5_1.5"]
    found, logged = weights(trainer, monkeypatch, *KEYS["preset"], *settings)
    assert logged["actor/hpo/alpha"] == pytest.approx(3 / 4)
    assert found == pytest.approx([1, *[3 / 4] * 3, 1, 1, 3 / 4], rel=1e-5)


OBSERVED = {
    "actor/hpo/observe/alpha": ALPHA,
    "actor/hpo/observe/share_positive": 3 / 12,
    "actor/hpo/observe/share_negative": 5 / 12,
    "actor/hpo/observe/share_degenerate_groups": 1 / 3,
    "actor/hpo/observe/response_length_positive": (1 + 3 + 1) / 3,
    "actor/hpo/observe/response_length_negative": (3 + 2 + 4 + 4 + 2) / 5,
}


def halves(token_level_rewards: torch.Tensor, response_mask: torch.Tensor, **_: Any) -> tuple[torch.Tensor, ...]:
    """An estimator of a user's own that changes its input, and knows no groups."""
    token_level_rewards *= 0.5
    advantages = token_level_rewards.sum(dim=1, keepdim=True) * response_mask
    return advantages, advantages


@pytest.mark.parametrize("estimator", ["grpo", "gae", "ahpo", "halves"])
@pytest.mark.parametrize("trainer", ALL)
def test_an_observed_step_is_bit_for_bit_the_same_step_and_logs_what_ahpo_would_count(monkeypatch, trainer, estimator):
    monkeypatch.setitem(core_algos.ADV_ESTIMATOR_REGISTRY, "halves", halves)
    metrics.drain()
    config = config_of(trainer, f"algorithm.adv_estimator={estimator}")
    without, logged_without = estimated(trainer, config, monkeypatch), metrics.drain()
    with open_dict(config):
        config.algorithm.hpo = {"observe": True}
    seams.prepare(config)
    state = torch.get_rng_state()
    observed, logged = estimated(trainer, config, monkeypatch), metrics.drain()
    assert torch.equal(torch.get_rng_state(), state)
    assert observed.keys() == without.keys()
    for name, value in without.items():
        assert (observed[name].dtype, observed[name].stride()) == (value.dtype, value.stride()), name
        assert torch.equal(observed[name], value), name
    assert logged == pytest.approx(logged_without | OBSERVED)
    assert bool(logged_without) is (estimator == "ahpo")


@pytest.mark.parametrize("trainer", ["V1 sync", "legacy", "one-step-off"])
def test_an_observed_step_has_the_limit_of_alpha_and_no_rejected_response(monkeypatch, trainer):
    """The last response of group c is rejected: 3 positives and 4 negatives of 11."""
    correction = "algorithm.rollout_correction"
    settings = [f"{BYPASS}=False", f"{correction}.rollout_rs=seq_mean_k1", f"{correction}.rollout_rs_threshold=0.5_1.5"]
    config = config_of(
        trainer, "algorithm.adv_estimator=grpo", "+algorithm.hpo={observe: true, alpha_min: 0.9}", *settings
    )
    metrics.drain()
    estimated(trainer, config, monkeypatch)
    logged = metrics.drain()
    assert logged["actor/hpo/observe/alpha"] == pytest.approx(0.9)
    assert logged["actor/hpo/observe/share_positive"] == pytest.approx(3 / 11)
    assert logged["actor/hpo/observe/share_negative"] == pytest.approx(4 / 11)
    assert logged["actor/hpo/observe/response_length_negative"] == pytest.approx((3 + 2 + 4 + 4) / 4)


def test_one_step_off_and_fully_async_estimate_advantages_where_separation_does():
    assert OneStepOffRayTrainer._fit_compute_advantage is SeparateRayPPOTrainer._fit_compute_advantage
    assert OneStepOffRayTrainer._fit_collect_metrics is SeparateRayPPOTrainer._fit_collect_metrics
    # Ray wraps the methods of an actor class, so its source is read.
    source = ast.parse((VERL / "experimental/fully_async_policy/fully_async_trainer.py").read_text(encoding="utf-8"))
    (cls,) = [n for n in source.body if isinstance(n, ast.ClassDef) and n.name == "FullyAsyncTrainer"]
    assert [ast.unparse(base) for base in cls.bases] == ["SeparateRayPPOTrainer"]
    own = {n.name for n in cls.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert not {"_fit_compute_advantage", "_fit_compute_log_prob"} & own


def test_v1_async_trainers_estimate_advantages_where_v1_sync_does():
    for name in ("sync", "colocate_async", "separate_async"):
        cls = trainer_base.get_trainer_cls(name)
        assert cls._compute_advantage is trainer_base.PPOTrainer._compute_advantage
        assert cls._compute_metrics is trainer_base.PPOTrainer._compute_metrics
