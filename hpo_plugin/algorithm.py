r"""The mathematics of HPO and A-HPO, in the symbols of the paper (arXiv 2605.30201).

For N responses with advantages :math:`A_i`, lengths :math:`T_i` and token ratios :math:`r_{it}`:

.. math::

    J = \frac{1}{N} \sum_i \frac{1}{\bar L} \sum_t
        w_i \min\bigl(r_{it} A_i,\ \mathrm{clip}(r_{it}, 1-\varepsilon_{lo}, 1+\varepsilon_{hi})\, A_i\bigr),
    \qquad \bar L = \frac{1}{N} \sum_i T_i

    w_i = 1 \text{ if } A_i \ge 0 \text{ else } \alpha,
    \qquad \text{HPO: } \alpha \in [0, 1] \text{ fixed},
    \qquad \text{A-HPO: } \alpha = \mathrm{clip}(\hat p^+ / \hat p^-,\ \alpha_{\min},\ 1)

===========================================  ==========================================================
in the equations                             in this file
===========================================  ==========================================================
:math:`A_i`, group-relative                  :func:`group_relative_advantage`
the sign of response i                       :func:`response_signs`
:math:`\hat p^+, \hat p^-`                   :func:`count_signs`, :class:`SignCounts`
:math:`\alpha`                               :func:`adaptive_alpha`
:math:`w_i`                                  :func:`hysteretic_weights`
:math:`w_i A_i`, from a batch's rewards      :func:`hysteretic_advantage`, which every framework adapter calls
:math:`-\min(r A, \mathrm{clip}(r) A)`       :func:`clipped_surrogate`
:math:`-J`, the loss                         :func:`hpo_loss`
===========================================  ==========================================================

All functions are pure functions of tensors. They compute inputs in half precision in fp32. This module does not depend
on a training framework.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "STD_EPSILON",
    "BatchStatistics",
    "ClippedSurrogate",
    "GroupAdvantage",
    "HystereticAdvantage",
    "RewardError",
    "SignCounts",
    "adaptive_alpha",
    "clipped_surrogate",
    "count_signs",
    "group_relative_advantage",
    "hpo_loss",
    "hysteretic_advantage",
    "hysteretic_weights",
    "response_signs",
]

#: Added to a group's standard deviation; the value of verl's ``grpo`` (verl/trainer/ppo/core_algos.py).
STD_EPSILON = 1e-6

#: Two rewards count as equal if they differ by less than this factor times the sum of their tokens' magnitudes. The
#: factor is eight units in the last place of fp32, the type in which every framework stores rewards.
ROUNDING = 8 * torch.finfo(torch.float32).eps

#: Largest magnitude of a reward. Far above it, fp32 arithmetic overflows: the standard deviation that a framework
#: computes becomes infinite and the advantages 0, or an advantage times a ratio of e^20 becomes infinite.
REWARD_LIMIT = 1e12

#: Log-ratios are clamped to ± this before ``exp``, as in every policy loss of verl.
LOG_RATIO_LIMIT = 20.0


class RewardError(ValueError):
    """Rewards that are NaN, infinite or above :data:`REWARD_LIMIT`; ``rows`` are their row numbers."""

    def __init__(self, rewards: Tensor, rows: list[int]) -> None:
        self.rows = rows
        large = bool(rewards[rows].isfinite().any())
        rule = f"at most {REWARD_LIMIT:g} in magnitude, summed over the tokens of a response" if large else "finite"
        super().__init__(
            f"rewards must be {rule}: {len(rows)} of {rewards.numel()} are "
            f"{'larger or not finite' if large else 'NaN or infinite'}, rows {rows[:8]}"
            f"{' …' if len(rows) > 8 else ''}, first value {rewards[rows[0]].item()}. Fix the reward function."
        )


class GroupAdvantage(NamedTuple):
    """Result of :func:`group_relative_advantage`.

    Attributes:
        advantage: (N,) floating point: A_i; exactly 0 in degenerate groups and for rows that are not valid.
        degenerate: (N,) bool: row i is valid and all valid rewards of its group are equal, up to rounding.
    """

    advantage: Tensor
    degenerate: Tensor


class SignCounts(NamedTuple):
    """Numbers of responses of a batch, by the sign of their advantage.

    Attributes:
        positive: 0-d int64: responses with A > 0.
        negative: 0-d int64: responses with A < 0.
        responses: 0-d int64: all valid responses.
    """

    positive: Tensor
    negative: Tensor
    responses: Tensor

    def share_positive(self) -> Tensor:
        """p̂⁺: 0-d fp32; 0 for an empty batch."""
        return self.positive / self.responses.clamp(min=1)

    def share_negative(self) -> Tensor:
        """p̂⁻: 0-d fp32; 0 for an empty batch."""
        return self.negative / self.responses.clamp(min=1)


class BatchStatistics(NamedTuple):
    """The statistics of one batch, from which its metrics are computed.

    All fields except ``alpha`` can be summed over batches, but not over parts of a batch: each part would have another
    α.

    Attributes:
        alpha: α of the batch.
        positive: Responses with A > 0.
        negative: Responses with A < 0.
        responses: Valid responses.
        groups: Groups with a valid response; 0 if the base estimator gives A ≠ 0 for equal rewards.
        degenerate_groups: Groups whose rewards are all equal, up to rounding.
        tokens: Σ T_i over valid responses.
        abs_advantage_positive: Σ T_i A_i over responses with A > 0.
        abs_advantage_negative: α Σ T_i |A_i| over responses with A < 0.
    """

    alpha: float
    positive: int
    negative: int
    responses: int
    groups: int
    degenerate_groups: int
    tokens: int
    abs_advantage_positive: float
    abs_advantage_negative: float


class HystereticAdvantage(NamedTuple):
    """Result of :func:`hysteretic_advantage`.

    Attributes:
        weighted: w_i A_i: (N,), or (N, T) for token-level base advantages.
        advantage: A_i, same shape, before the weights.
        alpha: α: 0-d fp32.
        counts: The counts that α was computed from.
        statistics: The statistics of the batch.
    """

    weighted: Tensor
    advantage: Tensor
    alpha: Tensor
    counts: SignCounts
    statistics: BatchStatistics


class ClippedSurrogate(NamedTuple):
    """Result of :func:`clipped_surrogate`; every field has the shape of ``log_prob``.

    Attributes:
        loss: fp32 or fp64, differentiable: the negated surrogate of each token, before any weight, mask or mean.
        log_ratio: log r, clamped to ±20; its negative is verl's k1 estimate of KL(old ‖ new).
        clipped: bool: the clip of the ratio decides the loss (verl's ``pg_clipfrac``).
        dual_clipped: bool: the dual clip decides the loss of a negative advantage (verl's ``pg_clipfrac_lower``).
    """

    loss: Tensor
    log_ratio: Tensor
    clipped: Tensor
    dual_clipped: Tensor


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def group_relative_advantage(
    rewards: Tensor,
    groups: Tensor,
    *,
    valid: Tensor | None = None,
    magnitude: Tensor | None = None,
    normalize_by_std: bool = True,
    epsilon: float = STD_EPSILON,
) -> GroupAdvantage:
    """A_i = r_i − mean of its group, divided by (std of its group + ε) if ``normalize_by_std``.

    HPO uses GRPO's advantage (paper, "Known" point 2). Mean and std are computed over the valid rows of the group; the
    std is unbiased, as in verl's ``grpo``. If a reward equals the mean of its group, A is *exactly* 0. Otherwise the
    rounding error of the mean, divided by ε, would turn noise into signs, which A-HPO would count. Two rewards are
    equal if they are equal up to :data:`ROUNDING`: a reward of 0.8 on one token and rewards of 0.1 on eight tokens are
    the same reward.

    Args:
        rewards: (N,) real, one scalar reward per response; any float, integer or bool dtype.
        groups: (N,) int64, the group number of each response, in any order, ``0 <= groups < N``.
        valid: (N,) bool or number, 0 if the row is not valid; rows that are not valid (padding, fully masked) do not
            count in the mean and get A = 0. If None, all rows are valid.
        magnitude: (N,) Σ_t |r_it|, the scale of the rounding of a reward that is a sum over tokens; |r_i| if None.
        normalize_by_std: whether to divide by the std, as GRPO does. Dr. GRPO does not.
        epsilon: ε.

    Returns:
        :class:`GroupAdvantage` of (N,) tensors without gradients on the device of ``rewards``; fp64 for fp64 rewards,
        else fp32.

    Raises:
        RewardError: if a valid reward, or its ``magnitude``, is NaN, infinite or above :data:`REWARD_LIMIT`.
        ValueError: if shapes differ, or a group number is not an integer in [0, N).
    """
    if rewards.dim() != 1 or any(x is not None and x.shape != rewards.shape for x in (groups, valid, magnitude)):
        raise ValueError(
            "rewards, groups, valid and magnitude must be (N,): got "
            f"{[None if x is None else tuple(x.shape) for x in (rewards, groups, valid, magnitude)]}"
        )
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.bool()
    # fp64: the statistics of groups take N numbers, not N × T, so the higher precision costs nothing.
    r = torch.where(valid, rewards.double(), 0.0)
    scale = r.abs() if magnitude is None else torch.where(valid, magnitude.double(), 0.0)
    # `not (x <= limit)` also finds NaN.
    bad = ~((r.abs() <= REWARD_LIMIT) & (scale <= REWARD_LIMIT))
    outside = (groups < 0) | (groups >= len(groups))
    if groups.dtype not in (torch.int32, torch.int64) or bool((bad | outside).any()):
        if bool(bad.any()):
            raise RewardError(rewards, bad.nonzero().flatten().tolist())
        raise ValueError(
            f"groups must be int64 in [0, N), N = {len(groups)} rewards: got {groups.dtype}, outside are "
            f"{sorted(set(groups[outside].tolist()))[:8]}. Number the groups from 0."
        )

    zeros = torch.zeros_like(r)
    size = zeros.index_add(0, groups, valid.double())
    mean = zeros.index_add(0, groups, r) / size.clamp(min=1)
    rounding = ROUNDING * zeros.scatter_reduce(0, groups, scale, "amax")
    centered = torch.where(valid, r - mean[groups], 0.0)
    centered = torch.where(centered.abs() <= rounding[groups], 0.0, centered)
    degenerate = valid & (zeros.scatter_reduce(0, groups, centered.abs(), "amax") == 0)[groups]

    advantage = centered
    if normalize_by_std:
        variance = zeros.index_add(0, groups, centered.square()) / (size - 1).clamp(min=1)
        advantage = centered / (variance.sqrt()[groups] + epsilon)
    return GroupAdvantage(advantage.to(rewards.dtype if rewards.dtype == torch.float64 else torch.float32), degenerate)


@torch.no_grad()
def hysteretic_advantage(
    rewards: Tensor,
    groups: Tensor,
    alpha: Callable[[SignCounts], Tensor | float],
    *,
    valid: Tensor | None = None,
    magnitude: Tensor | None = None,
    lengths: Tensor | None = None,
    normalize_by_std: bool = True,
    base: Tensor | None = None,
    base_is_zero_without_signal: bool = True,
    counted_rewards: Tensor | None = None,
) -> HystereticAdvantage:
    """Compute w_i A_i of a whole rollout batch from its rewards.

    The clipped surrogate is positively homogeneous in A, so the loss on w_i A_i is w_i times the loss on A_i. Every
    framework adapter calls this function once per batch, with all rows of the batch that α is computed from.

    Args:
        rewards: (N,) real, one scalar reward per response.
        groups: (N,) int64, the group number of each response, in any order, ``0 <= groups < N``.
        alpha: the rule that computes α from the sign counts of the batch (``hpo_plugin.variants``).
        valid: (N,) bool or number, 0 if the row is not valid; rows that are not valid get 0 and are not counted. If
            None, all rows are valid.
        magnitude: (N,) Σ_t |r_it|; see :func:`group_relative_advantage`.
        lengths: (N,) T_i in tokens, for the statistics only; 1 if None.
        normalize_by_std: see :func:`group_relative_advantage`; no effect with ``base``.
        base: (N,) or (N, T) advantages of another estimator, to which α is applied instead of the group-relative ones.
            (N, T) advantages are 0 at masked tokens, and a response has the sign of their sum. Half precision is
            computed in fp32.
        base_is_zero_without_signal: whether ``base`` is 0, up to rounding, if all rewards of a group are equal. The
            function then sets it to exactly 0. False for estimators that whiten over the batch.
        counted_rewards: (N,) rewards from which the function computes the sign counts and the degenerate groups instead
            of ``rewards``. Pass the task's scores if ``rewards`` contain a KL penalty.

    Returns:
        :class:`HystereticAdvantage`, without gradients; dtype and device of the advantages.

    Raises:
        RewardError: see :func:`group_relative_advantage`.
        ValueError: if shapes differ, a group number is not an integer in [0, N), an advantage of ``base`` is NaN or
            infinite, or the rule returns an α outside [0, 1].
    """
    if (lengths is not None and lengths.shape != rewards.shape) or (
        base is not None and (base.dim() not in (1, 2) or base.shape[:1] != rewards.shape)
    ):
        raise ValueError(
            "rewards and lengths must be (N,), base (N,) or (N, T): got "
            f"{[None if x is None else tuple(x.shape) for x in (rewards, lengths, base)]}"
        )
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.bool()
    own, degenerate = group_relative_advantage(
        rewards, groups, valid=valid, magnitude=magnitude, normalize_by_std=normalize_by_std
    )
    advantage = own
    if base is not None:
        base = _at_least_fp32(base)
        kept = valid & ~degenerate if base_is_zero_without_signal else valid
        advantage = torch.where(kept if base.dim() == 1 else kept.unsqueeze(-1), base, torch.zeros_like(base))
    magnitudes = (
        advantage.abs() * (1 if lengths is None else lengths) if advantage.dim() == 1 else advantage.abs().sum(-1)
    )
    signs = (advantage if advantage.dim() == 1 else advantage.sum(dim=-1)).sign()
    if counted_rewards is None:
        counts = count_signs(signs, valid)
    else:
        counted, degenerate = group_relative_advantage(counted_rewards, groups, valid=valid)
        counts = count_signs(counted, valid)
    value = torch.as_tensor(alpha(counts), dtype=torch.float32, device=rewards.device)
    weights = hysteretic_weights(signs, value)
    magnitudes = (magnitudes * weights).double()

    def groups_of(rows: Tensor) -> Tensor:
        return torch.zeros_like(magnitudes).index_add(0, groups, rows.double()).count_nonzero()

    relative = base is None or base_is_zero_without_signal
    numbers = torch.stack(
        [
            value.double(),
            *counts,
            groups_of(valid) * relative,
            groups_of(degenerate) * relative,
            valid.sum() if lengths is None else lengths[valid].double().sum(),
            magnitudes[signs > 0].sum(),
            magnitudes[signs < 0].sum(),
        ]
    ).tolist()
    statistics = BatchStatistics(numbers[0], *map(int, numbers[1:7]), *numbers[7:])
    if not 0 <= statistics.alpha <= 1:
        raise ValueError(
            f"the variant's rule returns α = {statistics.alpha}, which is not in [0, 1], for {counts}; correct the rule"
        )
    if not_finite := (~magnitudes.isfinite()).nonzero().flatten().tolist():
        raise ValueError(
            f"the advantages of the base estimator must be finite: {len(not_finite)} of {len(rewards)} responses have "
            f"one that is NaN or infinite, rows {not_finite[:8]}. Use another base estimator, or correct it."
        )
    weighted = advantage * (weights if advantage.dim() == 1 else weights.unsqueeze(-1))
    return HystereticAdvantage(weighted, advantage, value, counts, statistics)


def response_signs(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """The sign of each response: the sign of the masked sum of its token advantages.

    For an outcome advantage, which is equal on all tokens, this is the sign of A_i. For per-token advantages (GAE,
    optimal token baseline), a response still counts once and gets one weight.

    Args:
        advantages: (N, T) floating point.
        response_mask: (N, T) bool or number, nonzero if the token belongs to the response.

    Returns:
        (N,) fp32 (fp64 for fp64 input) of −1, 0 or 1; 0 for a fully masked row.
    """
    return torch.where(response_mask.bool(), _at_least_fp32(advantages), 0.0).sum(dim=-1).sign()


def count_signs(signs: Tensor, valid: Tensor | None = None) -> SignCounts:
    """Count responses by the sign of their advantage, for p̂⁺ and p̂⁻.

    Responses with A = 0 count as neither positive nor negative. Rows that are not valid are not counted.

    Args:
        signs: (N,) of −1, 0 or 1 (:func:`response_signs`), or any advantages of shape (N,).
        valid: (N,) bool or number, 0 if the row is not valid; if None, all rows are valid.

    Returns:
        :class:`SignCounts`. Counts of parts of a batch (ranks) can be summed; α must be computed from the sum.

    Raises:
        ValueError: if shapes differ.
    """
    valid = torch.ones_like(signs, dtype=torch.bool) if valid is None else valid.bool()
    if valid.shape != signs.shape:
        raise ValueError(f"signs and valid must be (N,): got {tuple(signs.shape)} and {tuple(valid.shape)}")
    return SignCounts(((signs > 0) & valid).sum(), ((signs < 0) & valid).sum(), valid.sum())


def adaptive_alpha(counts: SignCounts, alpha_min: float) -> Tensor:
    """α = clip(p̂⁺ / p̂⁻, α_min, 1), A-HPO's weight of negative advantages.

    The number of responses cancels out of the ratio. The limits are a choice of this package: p̂⁻ = 0 gives 1 (there is
    nothing to damp), p̂⁺ = 0 with p̂⁻ > 0 gives α_min.

    Args:
        counts: the counts of the *whole* rollout batch of the step, over all ranks, not of a micro-batch.
        alpha_min: α_min in [0, 1].

    Returns:
        0-d fp32 tensor in [α_min, 1].
    """
    ratio = counts.positive / counts.negative.clamp(min=1)
    return torch.where(counts.negative > 0, ratio.clamp(alpha_min, 1.0), 1.0)


def hysteretic_weights(signs: Tensor, alpha: Tensor | float) -> Tensor:
    """w_i = 1 if A_i ≥ 0, α if A_i < 0.

    Args:
        signs: (N,) of −1, 0 or 1.
        alpha: α in [0, 1], a number or a 0-d tensor.

    Returns:
        (N,) tensor, dtype of ``signs``.
    """
    return torch.ones_like(signs).masked_fill(signs < 0, alpha)


def clipped_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None = 3.0,
) -> ClippedSurrogate:
    """−min(r A, clip(r, 1−ε_lo, 1+ε_hi) A) for each token, with the dual clip on negative advantages.

    It is the same function of its inputs as verl's ``compute_policy_loss_vanilla`` before aggregation. It is positively
    homogeneous in A: for w ≥ 0, multiplying the loss by w is the same as replacing A by w A. Therefore α can be applied
    to the advantages, with any loss that has this property.

    Args:
        log_prob: (N, T) log-probabilities under the current policy; differentiated.
        old_log_prob: (N, T) log-probabilities under the policy that generated the responses, possibly recomputed.
        advantages: (N, T), or a shape that broadcasts to it.
        clip_low: ε_lo.
        clip_high: ε_hi.
        clip_dual: c > 1; a token with A < 0 costs at most c |A| (arXiv 1912.09729). None: no dual clip.

    Returns:
        :class:`ClippedSurrogate`.
    """
    advantages = _at_least_fp32(advantages)
    log_ratio = (_at_least_fp32(log_prob) - _at_least_fp32(old_log_prob)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    dual_clipped = torch.zeros_like(clipped)
    if clip_dual is not None:
        ceiling = -advantages * clip_dual
        dual_clipped = (advantages < 0) & (loss > ceiling)
        loss = torch.where(advantages < 0, torch.minimum(loss, ceiling), loss)
    return ClippedSurrogate(loss, log_ratio, clipped, dual_clipped)


def hpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    alpha: Tensor | float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float | None = 3.0,
) -> Tensor:
    r"""−J of one whole batch on one device: the reference for the tests of all distributed implementations.

    :math:`N \bar L` is the number of tokens, so the mean-length normalization is a mean over all tokens of the batch
    (verl's ``loss_agg_mode=token-mean``).

    Args:
        log_prob: (N, T) log-probabilities under the current policy; differentiated.
        old_log_prob: (N, T) log-probabilities under the old policy.
        advantages: (N, T), *without* α.
        response_mask: (N, T) bool or number; values at tokens where it is 0 have no effect, even if they are NaN.
        alpha: α of HPO, or A-HPO's from :func:`adaptive_alpha` on the whole batch.
        clip_low: ε_lo.
        clip_high: ε_hi.
        clip_dual: see :func:`clipped_surrogate`.

    Returns:
        0-d loss, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: if an input is not (N, T).
    """
    others = (old_log_prob, advantages, response_mask)
    if log_prob.is_nested or log_prob.dim() != 2 or any(x.shape != log_prob.shape for x in others):
        raise ValueError(
            "log_prob, old_log_prob, advantages and response_mask must be (N, T): got "
            f"{[tuple(x.shape) for x in (log_prob, *others)]}"
        )
    mask = response_mask.bool()
    log_prob, old_log_prob, advantages = (x.masked_fill(~mask, 0.0) for x in (log_prob, old_log_prob, advantages))
    weights = hysteretic_weights(response_signs(advantages, mask), alpha)
    surrogate = clipped_surrogate(
        log_prob, old_log_prob, advantages, clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual
    )
    per_token = torch.where(mask, weights.unsqueeze(-1) * surrogate.loss, 0.0)
    return per_token.sum() / mask.sum().clamp(min=1)
