"""``algorithm.adv_estimator=hpo|ahpo``: HPO's advantage estimators in verl.

Every trainer of verl calls the estimator in the driver, with all rows of the batch that α is computed from, padding
rows included (``compute_advantage``, verl/trainer/ppo/ray_trainer.py). Therefore the estimator computes and applies α.
Nothing else applies it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from hpo_plugin import algorithm, fused
from hpo_plugin.errors import ConfigError
from hpo_plugin.metrics import Observation, observe
from hpo_plugin.variants import VARIANTS
from hpo_plugin.verl import metrics
from hpo_plugin.verl import selection as keys
from hpo_plugin.verl.selection import BASE_ESTIMATORS

__all__ = [
    "estimator",
    "hysteretic_outcome_advantage",
    "last_rows",
    "record_built_in",
    "record_comparison",
    "record_observation",
]


@functools.cache
def estimator(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function registered in verl's ``ADV_ESTIMATOR_REGISTRY`` for a variant; the same object on every call."""
    return functools.partial(hysteretic_outcome_advantage, name)


def _group_numbers(index: np.ndarray) -> Tensor:
    """The group number of each row, (N,) int64, by the text of its uid. A dictionary takes a tenth of a sort's time.

    Raises:
        ValueError: if a uid is None or NaN.
    """
    values = np.asarray(index).reshape(-1).tolist()
    uids = list(map(str, values))
    number_of = dict(zip(dict.fromkeys(uids), range(len(uids)), strict=False))
    if "None" in number_of or "nan" in number_of:
        rows = [row for row, uid in enumerate(values) if uid is None or (isinstance(uid, float) and uid != uid)]
        if rows:
            raise ValueError(
                f"the `uid` of {len(rows)} of {len(uids)} rows is None or NaN, rows {rows[:8]}: their prompt is not "
                "known. Set `uid` in every row of the batch."
            )
    return torch.from_numpy(np.fromiter(map(number_of.__getitem__, uids), dtype=np.int64, count=len(uids)))


def last_rows(batch_keys: Sequence[str]) -> Tensor:
    """For each row, the index of the row with the last output of the same session, (N,) int64.

    Args:
        batch_keys: the keys of a batch of verl's V1 trainer, ``{uid}_{session}_{output}``
            (verl/trainer/ppo/v1/agent_loop_tq.py). Each output of an agent loop is a row; only the last output of a
            session has the session's reward.
    """
    last: dict[str, tuple[int, int]] = {}
    sessions = []
    for row, key in enumerate(batch_keys):
        session, _, output = key.rpartition("_")
        sessions.append(session)
        last[session] = max(last.get(session, (-1, -1)), (int(output), row))
    return torch.tensor([last[session][1] for session in sessions], dtype=torch.int64)


def _sessions(last_row: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row of each session's last output, the session of each row, and the number of tokens of each session."""
    rows, session = torch.unique(last_row, return_inverse=True)
    lengths = mask.sum(dim=1)
    return rows, session, torch.zeros_like(lengths[rows]).index_add(0, session, lengths)


def _getter(config: Any) -> Callable[[str, Any], Any]:
    """``get(key, default)`` of verl's ``algorithm`` node, a ``DictConfig`` or a dataclass."""
    return config.get if hasattr(config, "get") else lambda key, default: getattr(config, key, default)


def _base_advantages(base: str, rewards: Tensor, mask: Tensor, index: np.ndarray, valid: Tensor, config: Any) -> Any:
    """Advantages and returns of another estimator, computed on the valid rows; 0 in the other rows."""
    from verl.trainer.ppo import core_algos

    rows = valid.nonzero().flatten()
    results = core_algos.get_adv_estimator_fn(base)(
        token_level_rewards=algorithm._at_least_fp32(rewards[rows]),
        response_mask=mask[rows].long(),
        index=index[rows.numpy()],
        config=config,
    )
    return [torch.zeros(mask.shape, dtype=x.dtype).index_copy_(0, rows, x) for x in results]


def _require_single_outputs(groups: Tensor, valid: Tensor, index: np.ndarray, config: Any) -> None:
    """Raise a ConfigError if a prompt has more rows than ``rollout.n``: then its sessions have several outputs."""
    if not isinstance(config, DictConfig) or config._get_parent() is None or not valid.any():
        return
    n = OmegaConf.select(config, "..actor_rollout_ref.rollout.n", default=None)
    rows, group = torch.bincount(groups[valid]).max(dim=0)
    if n is not None and rows > n:
        raise ConfigError(
            f"actor_rollout_ref.rollout.n={n}, but the prompt (uid) {index[int((groups == group).nonzero()[0])]} has "
            f"{rows} rows in the batch. Its sessions have several outputs, and this trainer does not pass the session "
            "of a row to the estimator. Use verl's V1 trainer, or return one output per session."
        )


def hysteretic_outcome_advantage(
    name: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray | None = None,
    config: Any = None,
    *,
    last_row: Tensor | None = None,
    token_level_scores: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The advantages of a variant: the advantages of its base estimator, with α of this batch applied.

    Args:
        name: the variant.
        token_level_rewards: (N, T) real, where N is the number of rows of the whole rollout batch. The reward of a
            response is the sum over T. Other dtypes than fp64 are computed in fp32.
        response_mask: (N, T) of 0 and 1, int64 or any other dtype. Rows without a response token (padding, rejected)
            get 0 and belong to no group.
        index: (N,) array of uids, one per prompt, of any dtype; uids with the same text are the same. Rows of one uid
            need not be adjacent.
        config: verl's ``algorithm`` node. The function reads ``norm_adv_by_std_in_grpo``, ``use_kl_in_reward`` and
            ``hpo.*``.
        last_row: (N,) int64, see :func:`last_rows`. A session counts as one response with the reward of its last
            output, and all of its outputs get its advantage, as in verl's ``grpo``. If None, each row is a session.
        token_level_scores: (N, T) the task's scores. If given, responses are counted by these scores instead of
            ``token_level_rewards``, which contain a KL penalty.
        **kwargs: what verl passes to other estimators, such as ``reward_baselines``; not used.

    Returns:
        ``(advantages, returns)``, both (N, T) fp32 (fp64 for fp64 rewards). ``returns`` do not contain α, so that a
        critic can be trained on them.

    Raises:
        ConfigError: if a setting is invalid, or the responses cannot be counted: rewards with a KL penalty and no task
            scores, or sessions with several outputs in a trainer without session keys.
        ValueError: if a reward is NaN, infinite or too large (the message names the uids; see
            :class:`~hpo_plugin.algorithm.RewardError`), the batch has no uids, a uid is None or NaN, an advantage of
            the base estimator is NaN or infinite, or shapes differ.
    """
    if index is None:
        raise ValueError(
            f"{keys.KEY_ESTIMATOR}={name} is group-relative and needs the prompt's uid of each response, but the batch "
            "has no `uid` (verl passes it as `index`). Use a trainer of verl, or add `uid` to the batch."
        )
    get = _getter(config)
    settings, base = keys.read_settings(get("hpo", None))
    if get("use_kl_in_reward", False) and token_level_scores is None:
        raise ConfigError(keys.kl_in_reward(name, "this trainer"))
    if response_mask.dtype != torch.int64:
        response_mask = response_mask.bool()
    with torch.no_grad():
        index = np.asarray(index)
        rewards, mask, lengths = token_level_rewards, response_mask, response_mask.sum(dim=1)
        session = None
        if last_row is not None:
            rows, session, lengths = _sessions(last_row, response_mask)
            if len(rows) == len(last_row):
                session = None
            else:
                rewards, mask, index = rewards[rows], mask[rows], index[rows.numpy()]
                token_level_scores = None if token_level_scores is None else token_level_scores[rows]
        groups, valid = _group_numbers(index), fused.responses_with_tokens(mask)
        if last_row is None:
            _require_single_outputs(groups, valid, index, config)
        of_base = None
        if base != keys.OWN:
            of_base, base_returns = _base_advantages(base, rewards, mask, index, valid, config)
            if BASE_ESTIMATORS[base]:
                # A response has one advantage: that of its first token.
                of_base = of_base.gather(1, mask.int().argmax(dim=1, keepdim=True)).squeeze(1)
            elif session is not None:
                raise ConfigError(
                    f"{keys.KEY_BASE}={base} does not support sessions with several outputs. Set "
                    f"{keys.KEY_BASE}={keys.OWN}."
                )
        reward, magnitude = fused.rewards_of_responses(rewards)
        try:
            result = algorithm.hysteretic_advantage(
                reward,
                groups,
                lambda counts: VARIANTS[name].alpha(counts, settings),
                valid=valid,
                magnitude=magnitude,
                lengths=lengths,
                normalize_by_std=bool(get("norm_adv_by_std_in_grpo", True)),
                base=of_base,
                base_is_zero_without_signal=BASE_ESTIMATORS[base],
                counted_rewards=None
                if token_level_scores is None
                else fused.rewards_of_responses(token_level_scores)[0],
            )
        except algorithm.RewardError as error:
            prompts = dict.fromkeys(map(str, index[error.rows]))
            raise ValueError(f"{error} The rows belong to the prompts (uid): {', '.join(list(prompts)[:8])}.") from None
        metrics.record(result.statistics)
        weighted, unweighted = result.weighted, result.advantage
        if weighted.dim() == 2:
            return weighted, base_returns
        if session is not None:
            weighted, unweighted = weighted[session], unweighted[session]
        # A view takes no memory. Masked tokens get the same value as the others; verl does not read them.
        returns = unweighted.unsqueeze(-1).expand(response_mask.shape)
        # numpy requests huge pages from Linux, torch does not. Without them, allocation takes half of the time.
        out = torch.from_numpy(np.empty(response_mask.shape, dtype=f"f{weighted.itemsize}"))
        return fused.spread_over_tokens(weighted, response_mask, out=out), returns


def record_comparison(estimator: str, data: Any, last_row: Tensor) -> None:
    """Record the metrics of a batch (``DataProto``) of an algorithm without α, for comparison. They have α = 1."""
    rows = torch.unique(last_row)
    batch = {name: data.batch[name][rows] for name in ("advantages", "token_level_rewards", "response_mask")}
    reward, magnitude = fused.rewards_of_responses(batch["token_level_rewards"])
    with torch.no_grad():
        result = algorithm.hysteretic_advantage(
            reward,
            _group_numbers(data.non_tensor_batch["uid"][rows.numpy()]),
            lambda counts: 1.0,
            valid=fused.responses_with_tokens(batch["response_mask"]),
            magnitude=magnitude,
            lengths=batch["response_mask"].sum(dim=1),
            base=batch["advantages"],
            base_is_zero_without_signal=BASE_ESTIMATORS.get(estimator, estimator in ("grpo_vectorized", "grpo_passk")),
        )
    metrics.record(result.statistics)


def record_built_in(name: str, data: Any, config: Any, batch_keys: Sequence[str]) -> None:
    """Record the metrics of a batch (``DataProto``) whose advantages verl's own estimator computed.

    If verl's advantages differ from those of this package, the function logs a warning and records nothing. It raises
    no exception, because a metric must not stop a run.

    Args:
        name: the variant.
        data: the batch, with advantages.
        config: verl's ``algorithm`` node.
        batch_keys: see :func:`last_rows`.
    """
    rows = torch.arange(len(batch_keys))
    batch, mask = data.batch, data.batch["response_mask"]
    try:
        if not torch.equal(last_rows(batch_keys), rows):
            _warn_once(f"verl's built-in estimator {name} counts each output of a session as a response")
        ours, _ = estimator(name)(
            batch["token_level_rewards"], mask, data.non_tensor_batch["uid"], config, last_row=rows
        )
        if torch.allclose(ours * mask, batch["advantages"] * mask, rtol=1e-3, atol=1e-5):
            return
        metrics.drop_last()
        reason = "its advantages differ from those of hpo_plugin"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    _warn_once(f"no hpo metrics are logged for a batch of verl's built-in estimator {name}", reason)


def record_observation(data: Any, config: Any, batch_keys: Sequence[str] | None = None) -> None:
    """Record what A-HPO would count in a batch of verl (``DataProto``), if ``algorithm.hpo.observe`` is set.

    The function does not change the batch and draws no random number. If it cannot count a batch, it logs a warning and
    raises no exception, because a metric must not stop a run.

    Args:
        data: the batch that verl passes to the run's estimator.
        config: verl's ``algorithm`` node. If None, nothing is recorded.
        batch_keys: see :func:`last_rows`; a session with several outputs counts as one response. If None, each row
            counts as one.

    Raises:
        ConfigError: if ``algorithm.hpo.observe`` is not valid.
    """
    node = _getter(config)("hpo", None)
    if not keys.is_observed(node):
        return
    try:
        metrics.record_observation(_observation(data, config, node, batch_keys))
    except Exception as error:
        _warn_once(f"{keys.KEY_OBSERVE}=True cannot observe a batch ({type(error).__name__})", str(error))


def _observation(data: Any, config: Any, node: Any, batch_keys: Sequence[str] | None) -> Observation:
    if "uid" not in data.non_tensor_batch:
        raise ValueError("the batch has no `uid`, which identifies the prompt of a response")
    scores, mask = data.batch["token_level_scores"], data.batch["response_mask"]
    index, lengths = data.non_tensor_batch["uid"], mask.sum(dim=1)
    if batch_keys is not None:
        rows, _, lengths = _sessions(last_rows(batch_keys), mask)
        scores, mask, index = scores[rows], mask[rows], index[rows.numpy()]
    groups, valid = _group_numbers(index), fused.responses_with_tokens(mask)
    if batch_keys is None:
        _require_single_outputs(groups, valid, index, config)
    score, magnitude = fused.rewards_of_responses(scores)
    with torch.no_grad():
        result = algorithm.hysteretic_advantage(
            score, groups, lambda counts: 1.0, valid=valid, magnitude=magnitude, lengths=lengths
        )
    return observe(result, lengths, keys.read_settings(node)[0]["alpha_min"])


_warned: set[str] = set()


def _warn_once(message: str, reason: str = "") -> None:
    if message not in _warned:
        _warned.add(message)
        logging.getLogger(__name__).warning(f"{message}: {reason}" if reason else message)
