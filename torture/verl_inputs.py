"""Bad input to the algorithm through verl: the advantage estimator and the policy loss, as verl's trainers call them.

The batches and the oracle are those of :mod:`torture.algorithm_inputs`.
"""

from __future__ import annotations

import math
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from torture.algorithm_inputs import (
    EPSILON,
    EXPECTED,
    SUM,
    Batch,
    alpha_of,
    differs,
    loss_of,
    many,
    strided,
    wrong_advantages,
    wrong_gradient,
)
from torture.probe import Probe, Result
from torture.scale import MIB, peak_bytes


def algorithm_node(b: Batch) -> DictConfig:
    """The ``algorithm`` node of verl, in a root config."""
    algorithm = {"norm_adv_by_std_in_grpo": b.by_std, "use_kl_in_reward": False, "hpo": {"alpha_min": b.alpha_min}}
    root = {"algorithm": algorithm, "actor_rollout_ref": {"rollout": {"n": max(len(b.rewards), 1)}}}
    return OmegaConf.create(root).algorithm


def check_verl(b: Batch) -> list[str]:
    """The estimator through one of verl's functions, then the policy loss through another."""
    from verl import DataProto
    from verl.trainer.ppo import core_algos
    from verl.trainer.ppo.ray_trainer import compute_advantage
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    from hpo_plugin.verl import metrics

    rng, inside = b.rng, b.inside
    n, t = inside.shape
    rewards = torch.zeros(n, t, dtype=b.rewards.dtype)
    rewards[torch.arange(n), torch.tensor([rng.randrange(t) for _ in range(n)], dtype=torch.int64)] = b.rewards
    rewards, uids, config = strided(rewards, rng), b.uids, algorithm_node(b)
    missing = []
    if uids.dtype == object and rng.random() < 0.1:
        uids = uids.copy()
        missing = [row for row in range(n) if rng.random() < 0.3]
        for row in missing:
            uids[row] = rng.choice((None, math.nan))
    route = rng.choice(("registry", "compute_advantage", "V1")) if n else "registry"
    metrics.drain()
    try:
        if route == "registry":
            advantages, returns = core_algos.get_adv_estimator_fn("ahpo")(
                token_level_rewards=rewards, response_mask=b.mask, index=uids, config=config
            )
        else:
            data = DataProto.from_dict(
                tensors={"token_level_rewards": rewards, "token_level_scores": rewards, "response_mask": b.mask},
                non_tensors={"uid": uids.astype(object)},
            )
            if route == "V1":
                keys = [f"prompt_{row}_0" for row in range(n)]
                data = compute_advantage_for_multi_trajectories(data, keys, "ahpo", config=config)
            else:
                data = compute_advantage(data, adv_estimator="ahpo", config=config)
            advantages, returns = data.batch["advantages"], data.batch["returns"]
    except ValueError as error:
        expected = missing or b.bad_rows
        if expected and f"rows {expected[:8]}" in str(error):
            return []
        return [f"{route}: {error}; missing uids {missing}, bad rewards {b.bad_rows}"]
    if missing or b.bad_rows:
        return [f"{route}: no error; missing uids {missing}, bad rewards {b.bad_rows}"]
    weighted = torch.where(inside, advantages, 0.0).abs().amax(dim=1) * advantages.sum(dim=1).sign()
    if not torch.equal(advantages, weighted.unsqueeze(1) * inside) or not bool(returns.isfinite().all()):
        return [f"{route}: the tokens of a response have different advantages, or a return is not finite"]
    logged = {name.removeprefix("actor/"): value for name, value in metrics.drain().items()}
    wrong = wrong_advantages(b, weighted.tolist(), logged["hpo/alpha"], logged)
    return [f"{route}: {line}" for line in wrong] or check_loss(b, advantages)


@cache
def actor(clips: tuple[float, float, float | None]) -> Any:
    """The actor config of verl, which always has a dual clip."""
    from verl.workers.config import FSDPActorConfig

    from hpo_plugin.verl.config import HPOPolicyLossConfig

    low, high, dual = clips
    loss = HPOPolicyLossConfig(loss_mode="ahpo", adv_estimator="ahpo")
    values = {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": dual or 3.0}
    return FSDPActorConfig(rollout_n=8, ppo_micro_batch_size_per_gpu=1, policy_loss=loss, **values)


def check_loss(b: Batch, advantages: Tensor) -> list[str]:
    """The policy loss over micro-batches: verl's registry with padded tensors, or ``ppo_loss`` with nested tensors."""
    from verl.trainer.ppo import core_algos

    rng, inside = b.rng, b.inside
    n = len(inside)
    clips = (b.clips[0], b.clips[1], b.clips[2] or 3.0)
    advantages = advantages.to(rng.choice((advantages.dtype, torch.float64)))
    weighted = (advantages.sum(dim=1) / inside.sum(dim=1).clamp(min=1)).tolist()
    loss, size, gradient = loss_of(b.log_prob, b.old, weighted, inside, clips)
    config, tokens = actor(clips), int(inside.sum())
    log_prob = b.log_prob.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    micro = rng.choice((1, 3, max(n, 1)))
    name = rng.choice(("padded", "nested")) if n else "padded"
    known = rng.choice((tokens, torch.tensor(tokens)) if micro < n else (tokens, torch.tensor(tokens), None))
    total = 0.0
    parts = [slice(first, first + micro) for first in range(0, n, micro)] or [slice(0, 0)]
    for rows in parts:
        if name == "padded":
            config.global_batch_info.update({"dp_size": 1, "batch_num_tokens": known})
            found, logged = core_algos.get_policy_loss_fn("ahpo")(
                old_log_prob=b.old[rows],
                log_prob=log_prob[rows],
                advantages=advantages[rows],
                response_mask=b.mask[rows],
                loss_agg_mode="token-mean",
                config=config,
            )
        else:
            found, logged = nested_loss(config, b, log_prob, advantages, rows, tokens if known is None else known)
        if not all(math.isfinite(plain(value)) for value in logged.values()):
            return [f"{name}: metrics {logged}"]
        found.backward()
        total += found.item()
    wrong = [f"{name}: the loss is {total}, not {loss}"] if differs(total, loss, SUM, size) else []
    return wrong + wrong_gradient(name, log_prob.grad, gradient)


def plain(metric: Any) -> float:
    """The value of a metric, which is a number or verl's ``Metric``."""
    values = getattr(metric, "values", None)
    return float(sum(map(float, values))) if values is not None else float(metric)


def nested_loss(
    config: Any, b: Batch, log_prob: Tensor, advantages: Tensor, rows: slice, tokens: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The ``ppo_loss`` of verl on nested tensors, as its V1 trainer passes them: prompts of one token, no padding."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.utils.losses import ppo_loss

    inside = b.inside[rows]
    positions = torch.arange(1, inside.shape[1] + 1)
    lengths = (positions * inside).amax(dim=1).clamp(min=1).tolist()

    def nested(x: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor([row[:k] for row, k in zip(x, lengths, strict=True)], layout=torch.jagged)

    ids = torch.zeros(inside.shape, dtype=torch.int64)
    data = TensorDict(
        {
            "prompts": torch.nested.as_nested_tensor(list(ids[:, :1]), layout=torch.jagged),
            "responses": nested(ids),
            "response_mask": nested(b.mask[rows]),
            "old_log_probs": nested(b.old[rows]),
            "advantages": nested(advantages[rows]),
        },
        batch_size=[len(ids)],
    )
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=len(b.rewards))
    # The model's output has one more position, for the prompt, and is shifted by one token.
    extra = torch.full((1,), math.nan, dtype=log_prob.dtype)
    output = torch.cat([torch.cat([row[:k], extra]) for row, k in zip(log_prob[rows], lengths, strict=True)])
    offsets = torch.tensor([0, *[k + 1 for k in lengths]]).cumsum(0)
    return ppo_loss(config, {"log_probs": torch.nested.nested_tensor_from_jagged(output, offsets)}, data)


# --- large batches -------------------------------------------------------------------------------------------------


def large(rows: int, tokens: int, folder: Path) -> Result:
    """A batch with many rows, or with long responses: time and peak memory of the estimator and of the policy loss.

    Args:
        rows: number of responses; groups of 8 rows that are not adjacent.
        tokens: length of the longest response; the others have a random length.
        folder: not used.
    """
    from verl.trainer.ppo import core_algos

    from hpo_plugin.verl import metrics

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    lengths[0] = tokens
    groups = torch.randperm(rows, generator=generator).numpy() // 8
    scores = (torch.rand(rows, generator=generator) < 0.1).double()
    mask = (torch.arange(tokens) < lengths.unsqueeze(1)).long()
    rewards = torch.zeros(rows, tokens)
    rewards[torch.arange(rows), lengths - 1] = scores.float()
    uids = np.array([f"prompt-{group}" for group in groups], dtype=object)
    old = torch.full((rows, tokens), -1.0)
    log_prob = (old + 0.1 * torch.randn(rows, tokens, generator=generator)).requires_grad_()
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": True, "hpo": {"alpha_min": 0.1}})
    number = int(lengths.sum())
    actor_config = actor((0.2, 0.2, 3.0))
    actor_config.global_batch_info.update({"dp_size": 1, "batch_num_tokens": number})
    clock: list[float] = []

    def step() -> Tensor:
        clock.append(time.process_time())
        advantages, _ = core_algos.get_adv_estimator_fn("ahpo")(
            token_level_rewards=rewards, response_mask=mask, index=uids, config=config
        )
        clock.append(time.process_time())
        loss, _ = core_algos.get_policy_loss_fn("ahpo")(old, log_prob, advantages, mask, "token-mean", actor_config)
        loss.backward()
        clock.append(time.process_time())
        return advantages

    metrics.drain()
    result = Result(inputs=1)
    peak, found = peak_bytes(step)
    logged = metrics.drain()

    # numpy in fp64.
    r = scores.numpy()
    size = np.bincount(groups)
    centered = r - (np.bincount(groups, r) / size)[groups]
    spread = np.sqrt(np.bincount(groups, centered**2) / np.maximum(size - 1, 1))[groups]
    plain = np.where(np.abs(centered) > 1e-9, centered / (spread + EPSILON), 0.0)
    positive, negative = int((plain > 0).sum()), int((plain < 0).sum())
    alpha = alpha_of(positive, negative, 0.1)
    weighted = np.where(plain < 0, alpha * plain, plain)
    for name, expected in {
        "alpha": alpha,
        "share_positive": positive / rows,
        "share_negative": negative / rows,
        "response_length": number / rows,
    }.items():
        if differs(logged[f"actor/hpo/{name}"], expected, 1e-6):
            result.failures.append(f"{rows} x {tokens}: {name} is {logged[f'actor/hpo/{name}']}, not {expected}")
    gradient = log_prob.grad
    assert gradient is not None
    inside = mask.bool()
    if not np.allclose(found[:, 0].numpy(), weighted, rtol=1e-6, atol=0) or bool(found[~inside].any()):
        result.failures.append(f"{rows} x {tokens}: wrong advantages")
    if not bool(gradient.isfinite().all()) or bool(gradient[~inside].any()):
        result.failures.append(f"{rows} x {tokens}: a gradient that is not finite, or outside the mask")
    for row in range(0, rows, max(rows // 64, 1)):
        n, a = int(lengths[row]), weighted[row]
        ratio = np.exp((log_prob[row, :n].detach().double() - old[row, :n].double()).numpy())
        bounded = np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
        slope = np.where(bounded == ratio * a, -ratio * a, 0.0) / number
        edge = (np.abs(ratio - 0.8) < 1e-5) | (np.abs(ratio - 1.2) < 1e-5)
        if not np.allclose(gradient[row, :n].numpy()[~edge], slope[~edge], rtol=1e-5, atol=0):
            result.failures.append(f"{rows} x {tokens}, row {row}: wrong gradient")
            break
    name = f"{rows:,} x {tokens:,}"
    result.measure(f"{name}: estimator (s CPU)", clock[1] - clock[0])
    result.measure(f"{name}: policy loss with gradient (s CPU)", clock[2] - clock[1])
    result.measure(f"{name}: peak memory beyond the batch (MiB)", peak / MIB)
    return result


#: Batches of a case.
BATCHES = 10_000

PROBES: tuple[Probe, ...] = (
    Probe(
        "algorithm-verl",
        "algorithm-inputs",
        "batches for verl's advantage estimators and policy loss, padded and nested, in micro-batches",
        EXPECTED,
        {f"part-{k}": partial(many, check_verl, BATCHES, k * BATCHES) for k in range(2)},
    ),
    Probe(
        "algorithm-large",
        "algorithm-inputs",
        "one million responses of up to 8 tokens, and 64 responses of up to 100,000 tokens, with verl",
        "numpy's result in fp64",
        {"rows": partial(large, 1_000_000, 8), "tokens": partial(large, 64, 100_000)},
    ),
)
